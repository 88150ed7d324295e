"""anyio's subprocesses, unchanged, on our loops."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from typing import Any

import pytest

import aiopidfd

from .conftest import run_on

anyio = pytest.importorskip("anyio", reason="anyio is not installed")


def loop_classes() -> list[Any]:
    """Ours; uvloop's may be missing."""
    return [aiopidfd.SelectorEventLoop] + ([] if find_spec("uvloop") is None else [aiopidfd.UvloopEventLoop])


@pytest.mark.parametrize("loop_class", loop_classes())
def test_run_process(loop_class: Any) -> None:
    async def main() -> None:
        ran = await anyio.run_process(["/bin/sh", "-c", "cat; echo err >&2; exit 3"], input=b"in", check=False)
        assert (ran.returncode, ran.stdout, ran.stderr) == (3, b"in", b"err\n")

    run_on(loop_class, main())


@pytest.mark.parametrize("loop_class", loop_classes())
def test_open_process(loop_class: Any) -> None:
    async def main() -> None:
        async with await anyio.open_process(["/bin/cat"]) as process:
            await process.stdin.send(b"hello")
            assert await process.stdout.receive() == b"hello"
            process.send_signal(signal.SIGUSR1)
            assert await process.wait() == -signal.SIGUSR1

    run_on(loop_class, main())


@pytest.mark.parametrize("loop_class", loop_classes())
def test_cancelled_run_process_leaves_no_process(loop_class: Any) -> None:
    """The fixture that sees what is left behind is the test."""

    async def main() -> None:
        with anyio.move_on_after(0.05) as scope:
            await anyio.run_process(["/bin/sleep", "60"])
        assert scope.cancelled_caught

    run_on(loop_class, main())
