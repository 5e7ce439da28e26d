"""Every run of the suite tries the same cases, at whatever speed: a failure is the change's, not the day's."""

import contextlib

with contextlib.suppress(ModuleNotFoundError):  # `make gpu-check` needs pytest alone
    from hypothesis import settings

    settings.register_profile("fixed", derandomize=True, deadline=None)
    settings.load_profile("fixed")
