"""Hard limits on one file, so that an endless or huge video ends itself and nothing else."""

import resource
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """A file beyond any of these is rejected, with the limit as the reason.

    Raises:
        ValueError: A limit is not positive.
    """

    seconds: float = 3600.0
    """Wall time."""
    frames: int = 1_000_000
    pixels: int = 1 << 26
    """Of one frame; the default is 8192 x 8192."""
    memory_mib: int = 8192
    """Address space of the process beyond its own at the start."""

    def __post_init__(self) -> None:
        for name in ("seconds", "frames", "pixels", "memory_mib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be above 0")


def limit_memory(mebibytes: int) -> None:
    """Limit this process's address space to that of now and so much more. Decoders then fail, the machine does not."""
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = own + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
