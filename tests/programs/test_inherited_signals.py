"""A program inherits blocked and ignored signals as with Popen."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from typing import Any

import pytest

from ..conftest import LoopFactory, run_on
from ..helpers.subprocesses import (
    BY_POPEN,
    PIPE,
    plug,  # noqa: F401 - pytest looks for it in this module
    pytest_generate_tests,  # noqa: F401 - pytest looks for it in this module
)

# Each test runs on loops of our classes, and on other loops with a watcher: see `plug`.
pytestmark = pytest.mark.usefixtures("plug")

LOOK = ["grep", "-E", "^Sig(Blk|Ign|Cgt)", "/proc/self/status"]


@pytest.mark.parametrize("keywords", [{}, {"restore_signals": False}, BY_POPEN], ids=["in C", "kept", "by Popen"])
def test_child_inherits_blocked_and_ignored_signals_as_with_popen(
    loop_factory: LoopFactory, keywords: dict[str, Any]
) -> None:
    """libuv, and so uvloop itself, unblocks all signals and resets them to their defaults."""

    async def look() -> bytes:
        process = await asyncio.create_subprocess_exec(*LOOK, stdout=PIPE, **keywords)
        return (await process.communicate())[0]

    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    old_handlers = [
        (number, signal.signal(number, handler))
        for number, handler in ((signal.SIGUSR2, signal.SIG_IGN), (signal.SIGHUP, print), (signal.SIGINT, signal.SIG_IGN))
    ]
    try:
        ours = run_on(loop_factory, look())
        expected = subprocess.run(LOOK, check=True, stdout=PIPE, **keywords).stdout
    finally:
        for number, handler in old_handlers:
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
    assert ours == expected
    blocked, ignored, caught = (int(line.split()[1], 16) for line in ours.splitlines())
    assert blocked >> signal.SIGUSR1 - 1 & 1
    assert ignored >> signal.SIGUSR2 - 1 & 1
    assert caught >> signal.SIGHUP - 1 & 1 == 0
