"""``vito-fast plan``."""

import json
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from vito_fast.config import ClipFilter, Config
from vito_fast.data.store.description import FORMATS
from vito_fast.data.store.index import Index
from vito_fast.data.store.remote import is_remote
from vito_fast.data.store.selection import select
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError
from vito_fast.plan.hardware import machine
from vito_fast.plan.predict import PlanOptions, alternatives, predict
from vito_fast.plan.report import as_json, assumptions, console, show


@dataclass(frozen=True)
class Plan:
    """Predict a run's time, memory and storage, and its bottleneck.

    usage: vito-fast plan CONFIG [--gpu h100 --gpus 8 ...] [--section.field VALUE ...]
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    options: Annotated[PlanOptions, tyro.conf.arg(name="")] = field(default_factory=PlanOptions)
    json: bool = False
    """Print the prediction as JSON."""
    assumptions: bool = False
    """Print every constant with its source, and nothing else."""

    def run(self) -> int:
        """Prints the prediction; returns the exit status."""
        options = self.options
        if options.store:
            options = from_store(options, ClipFilter.parse(self.config.data.where))
        constants = machine(options.gpu, options.calibrate or None)
        if self.assumptions:
            console().print(assumptions(constants))
            return 0
        prediction = predict(self.config, options, constants)
        others = alternatives(prediction)
        if self.json:
            print(json.dumps(as_json(prediction, others), indent=1))
        else:
            show(prediction, others, console())
        return 0


def from_store(options: PlanOptions, where: ClipFilter) -> PlanOptions:
    """Fills in the number of clips that pass ``where``, the format and the bytes a frame of the options' store.

    Raises:
        UserError: no readable store, an empty one, or one of which no clip passes.
    """
    whole = is_remote(options.store) or where != ClipFilter()  # else the index is enough
    try:
        store = Store(options.store, check=False) if whole else None
        index = store.index if store else Index(f"{options.store}/index.bin")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot plan for the store {options.store}: {error}") from None
    if not index.num_clips:
        raise UserError(f"the store {options.store} holds no clips")
    size = sum(size for _, size in index.shards) / max(1, index.num_frames)
    if index.format not in FORMATS:
        raise UserError(f"cannot plan for the store {options.store}: its format is {index.format!r}")
    clips = len(select(store, where)) if store else index.num_clips
    return replace(options, clips=clips, format=FORMATS[index.format].name, frame_bytes=size)
