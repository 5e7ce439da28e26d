"""Packing on a Ray cluster: each task packs one share of the files. All nodes see the source and the store's folder."""

import logging
import os
from pathlib import Path
from typing import Any

from vito_fast.data.pack.pack import choose_store_encoder, pack
from vito_fast.data.store.description import FORMATS, PackOptions, Report, read_json
from vito_fast.data.store.remote import is_remote
from vito_fast.errors import UserError

log = logging.getLogger("vito_fast.data")


def connect() -> Any:
    """The module ``ray``, connected to the cluster of ``RAY_ADDRESS``, or to one of this machine alone.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("Ray is not installed: pip install 'vito-fast[ray]', or --engine local") from None
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS") or None, log_to_driver=False, include_dashboard=False)
    return ray


def pack_on_ray(src: str | os.PathLike[str], dst: str | os.PathLike[str], **options: Any) -> Report:
    """:func:`pack` on a Ray cluster, in one share for each CPU. Safe to kill at any time and to repeat.

    A task whose node is lost runs again elsewhere and continues from its journal. The store has the clips and labels
    of :func:`pack`. Only the distribution of packets over shards differs.

    Args:
        src, dst: As of :func:`pack`, on a file system that all nodes see.
        options: As of :func:`pack`, without ``shard``, ``processes`` and ``progress``.

    Returns:
        The report.

    Raises:
        UserError: As of :func:`pack`, or Ray is not installed.
        ValueError: An option is out of range.
    """
    if is_remote(dst):
        raise UserError(f"{dst} is an address: pack on Ray into a folder that all nodes see, and upload that")
    ray, store = connect(), Path(dst).absolute()
    begun = store / ".pack" / "options.json"
    shares = int(read_json(begun)["parts"]) if begun.exists() else max(1, int(ray.cluster_resources().get("CPU", 1)))
    finished = (store / "index.bin").exists()
    if options.get("encoder", "auto") == "auto":  # one for all nodes
        coded = FORMATS.get(options.get("format", PackOptions.format))
        options["encoder"] = choose_store_encoder(store, finished) if coded and coded.encoders else PackOptions.encoder
    task = ray.remote(num_cpus=1, max_retries=-1)(pack)
    options |= {"processes": 1, "progress": False}
    shared = range(0) if finished else range(1, shares + 1)
    waiting = {
        task.remote(Path(src).absolute(), store, shard=f"{share}/{shares}", **options): share for share in shared
    }
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        share = waiting.pop(ready)
        try:
            ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        log.info("share %d of %d is packed", share, shares)
    return pack(src, store, shard=f"1/{shares}", **options)
