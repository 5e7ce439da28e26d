"""Every run of the suite tries the same cases, at whatever speed: a failure is the change's, not the day's.

``--hypothesis-seed=N`` tries others.
"""

import contextlib
import os

import pytest

with contextlib.suppress(ModuleNotFoundError):  # `make gpu-check` needs pytest alone
    from hypothesis import settings

    settings.register_profile("fixed", derandomize=True, deadline=None)
    settings.register_profile("seeded", derandomize=False, deadline=None, database=None)

POLICY = os.sched_getscheduler(0), os.sched_getparam(0)


def pytest_configure(config):
    with contextlib.suppress(NameError):  # without hypothesis
        settings.load_profile("fixed" if config.getoption("--hypothesis-seed", None) is None else "seeded")


def _time_shared():
    """Undoes what SVT-AV1 does where it may (as root): it makes the thread that encodes a real-time one, and all that
    this thread starts. Of three such ranks on two cores, two wait for messages in a loop, and the third never runs.
    """
    if os.sched_getscheduler(0) != POLICY[0]:
        os.sched_setscheduler(0, *POLICY)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    try:
        return (yield)
    finally:
        _time_shared()


pytest_fixture_setup = pytest_runtest_call
