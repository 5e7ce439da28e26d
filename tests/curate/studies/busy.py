"""A step that is busy for a while: for the engine's own cost, and to be killed."""

import time

import pyarrow as pa

SCHEMA = pa.schema([("item_id", pa.string()), ("status", pa.string()), ("reason", pa.string()), ("value", pa.int64())])


def run(data, options):
    begin = time.process_time()
    while time.process_time() - begin < data["seconds"]:
        pass
    return {"status": "ok", "reason": "", "value": data["value"]}


def rejected(data, reason):
    return {"status": "rejected", "reason": reason, "value": -1}
