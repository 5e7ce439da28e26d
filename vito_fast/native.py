"""The compiled sampler (csrc/), or one line that names the fix.

The build skips it where no C++ compiler is found, so that the kernels install anywhere.
"""

from vito_fast.errors import UserError

try:
    from vito_fast import _sampler as sampler
except ImportError as error:
    fix = "apt-get install g++ && pip install --no-cache-dir --force-reinstall --no-deps 'vito-fast[train]'"
    raise UserError(f"the C++ sampler is not built: {fix} ({error})") from None

__all__ = ["sampler"]
