"""A step for the engine's tests: items that work, crash, hang, need memory or are killed once."""

import os
import signal
import time
from pathlib import Path

import pyarrow as pa

from vito_fast.data.store.media import BadVideo

SCHEMA = pa.schema([("item_id", pa.string()), ("status", pa.string()), ("reason", pa.string()), ("value", pa.int64())])


def run(data, options):
    act = data["act"]
    if act == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif act == "hang":
        time.sleep(600)
    elif act == "memory":
        bytearray(1 << 33)
    elif act == "bad":
        raise BadVideo("a bad one")
    elif act == "killed" and len(list(Path(data["marks"]).iterdir())) < data["times"]:
        (Path(data["marks"]) / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"status": "ok", "reason": "", "value": data["value"] * options["factor"]}


def rejected(data, reason):
    return {"status": "rejected", "reason": reason, "value": -1}
