"""Which clips of a store pass a filter: a pure function of its index and its labels."""

import re
from fnmatch import translate

import numpy as np
import numpy.typing as npt

from vito_fast.config import ClipFilter
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError

ROUNDING = 0.005
"""Frames per second by which a rate may be below the least one: 30000 / 1001 passes for 29.97."""


def select(store: Store, where: ClipFilter) -> npt.NDArray[np.int64]:
    """The clips that pass a filter.

    Args:
        store: The store. Labels and groups are those of its ``labels.parquet``.
        where: The filter.

    Returns:
        (n,) int64, their numbers, ascending, n > 0.

    Raises:
        UserError: No clip passes, or the filter names labels or groups and the store has none.
    """
    passed = np.ones(len(store), bool)
    if where.labels or where.groups:
        labels = store.labels()
        if labels is None:
            raise UserError(f"{store.name} has no labels.parquet to filter by labels or groups")
        if where.labels:
            passed &= labels.of_classes(where.labels)
        if where.groups:
            passed &= labels.of_groups(where.groups)
    try:
        if where.min_seconds or where.min_side or where.min_rate:
            seconds, side, frames = store.index.measures()
            passed &= (seconds >= where.min_seconds) & (side >= where.min_side)
            passed &= frames >= (where.min_rate - ROUNDING) * seconds
        if where.sources:
            pattern = re.compile("|".join(map(translate, where.sources)))
            for clip in np.flatnonzero(passed):
                passed[clip] = pattern.match(store.index.clip(int(clip)).source) is not None
    except ValueError as error:
        raise UserError(f"cannot filter {store.name}: {error}") from None
    if not passed.any():
        raise UserError(f"no clip of {store.name} is left: loosen the filters")
    return np.flatnonzero(passed)
