"""The compiled sampler (csrc/), or one line that names the fix.

The build skips it where no C++ compiler is found, so that the kernels install anywhere.
"""

from vito_fast.errors import UserError

try:
    from vito_fast import _sampler as sampler
except ImportError as error:
    fix = "apt-get install g++ && pip install --no-cache-dir --force-reinstall --no-deps 'vito-fast[train]'"
    raise UserError(f"the C++ sampler is not built: {fix} ({error})") from None

API = 4
"""Version of the interface that this source needs."""
if getattr(sampler, "API", 1) != API:
    raise UserError(f"{sampler.__file__} is of another version of the source: build it again (pip install -e .)")

__all__ = ["sampler"]
