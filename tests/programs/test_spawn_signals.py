"""A signal to a new child before its exec: it must not run a handler of its parent, whose memory it shares."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from ..conftest import BACKENDS
from ..helpers.seccomp import compile_c, under_filter

pytestmark = pytest.mark.skipif("pidfd" not in BACKENDS, reason="pidfds are forbidden here, and so is a start in C")

_START = """
import asyncio, signal, sys
import aiopidfd
called = []
signal.signal(signal.SIGUSR1, lambda *_: called.append(1))

async def main():
    process = await asyncio.create_subprocess_exec("/bin/true", start_new_session=True)
    return await process.wait()

print(aiopidfd.features().spawn, aiopidfd.run(main(), loop_factory=aiopidfd.SelectorEventLoop), called)
"""


@pytest.mark.parametrize("refused", ["io_uring_setup", "clone3"])
def test_signal_to_a_child_before_it_runs_its_program_ends_it_and_calls_no_handler(refused: str) -> None:
    """With clone3, which clears all handlers, and with clone, where the child clears them. Each filter forbids one."""
    library = str(compile_c("raises.c", "-shared", "-fPIC"))
    preload = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), library]))
    done = under_filter(refused, [sys.executable, "-c", _START], env={**os.environ, "LD_PRELOAD": preload})
    assert (done.stdout, done.stderr) == (f"clone {-signal.SIGUSR1} []\n", "")
