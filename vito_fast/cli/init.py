"""``vito-fast init``."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from vito_fast.cli.overrides import Address
from vito_fast.config_files import load_config, to_mapping
from vito_fast.errors import UserError
from vito_fast.files import atomic_write, check_writable


def init(
    videos: Address,
    out: Annotated[Path | None, tyro.conf.Positional] = None,
    store: str = "",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    check: str = "",
) -> int:
    """Propose a configuration for some videos and this machine, and say why.

    Args:
        videos: A folder of videos, one video, or a store.
        out: The configuration to write, by default NAME.yaml after the folder.
        store: The store that it names; by default VIDEOS if that is one, else data/NAME/store.
        device: auto takes a GPU where there is one.
        check: A configuration. Propose nothing, and fail if the videos cannot fill one of its batches.
    """
    from vito_fast.plan import propose
    from vito_fast.train.distributed import init_distributed

    footage = propose.look(videos)
    if check:
        propose.check(load_config(check), footage)
        print(f"{videos}: about {footage.clips} clips fill a batch of {check}")
        return 0
    folder = Path(videos).absolute()  # a link gives its own name
    name = folder.parent.name if footage.packed and folder.name == "store" else folder.stem
    out = out or Path(f"{name}.yaml")
    if out.exists():
        raise UserError(f"{out} is there already: give another name, vito-fast init {videos} OUT.yaml")
    check_writable(out)
    place = init_distributed(device).device
    config, reasons = propose.propose(footage, store or (videos if footage.packed else f"data/{name}/store"), place)
    config, seconds = propose.measure(config, place)
    kind = "clips of a store" if footage.packed else "clips, if packed in 10 s"
    lines = [
        f"{videos}: {footage.videos} videos, {propose.duration(footage.hours * 3600)}, {footage.clips} {kind}",
        *reasons,
        *propose.costs(config, footage, seconds),
    ]
    with atomic_write(out) as partial:
        partial.write_text(_yaml(to_mapping(config), lines), encoding="utf-8")
    print("\n".join(lines))
    if not footage.packed:
        print(f"next: vito-fast pack {videos} {config.data.store}")
    print(f"next: vito-fast train {out}")
    return 0


def _yaml(mapping: dict[str, object], lines: list[str]) -> str:
    """The fields that differ from the defaults, under the reasons."""
    import yaml

    from vito_fast.config import Config

    default = to_mapping(Config())
    changed: dict[str, object] = {}
    for section, values in mapping.items():
        if isinstance(values, dict):
            own = {key: value for key, value in values.items() if value != default[section][key]}
            changed |= {section: own} if own else {}
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(changed, sort_keys=False)
