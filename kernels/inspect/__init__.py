"""Compiles every shipped kernel without a GPU and reads its machine code: ``python -m vito_kernels.inspect``."""

from .compiled import TARGETS, inspect, inspect_job, main, specs, stand_in

__all__ = ["TARGETS", "inspect", "inspect_job", "main", "specs", "stand_in"]
