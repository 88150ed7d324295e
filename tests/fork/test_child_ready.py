"""Readiness that goes wrong: descriptors that are closed before, exec; and forks by threads that C has made."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest

from aiopidfd import ChildStartError, afork, notify_ready
from aiopidfd._fork import afork as forking
from aiopidfd._kernel import proc

from ..conftest import LoopFactory, run_on
from ..helpers.workers import fork_server


def _close_all_and_say(path: Path) -> None:
    os.closerange(3, 256)
    for _ in range(253):
        os.open(path, os.O_RDWR | os.O_APPEND)  # all numbers are somebody else's now
    try:
        notify_ready()
    except RuntimeError:
        for fd in range(3, 256):
            os.fstat(fd)
        os._exit(7)


async def test_readiness_is_not_written_into_a_strangers_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ChildStartError) as caught:
        await afork(lambda: _close_all_and_say(path), ready="manual")
    assert caught.value.exit_status.returncode == 7
    async with fork_server() as server:
        with pytest.raises(ChildStartError) as caught:
            await server.afork(_close_all_and_say, path, ready="manual")
        assert caught.value.exit_status.returncode == 7
    assert path.stat().st_size == 0


def _exec_away(*command: str) -> None:
    os.execv(f"/bin/{command[0]}", command)


async def test_exec_before_readiness_is_a_clear_error() -> None:
    with pytest.raises(ChildStartError, match=r"process \d+ called exec before it was ready.*notify_ready\(\)"):
        await afork(partial(_exec_away, "sleep", "60"), ready="manual")
    async with fork_server() as server:
        with pytest.raises(ChildStartError, match="called exec before it was ready"):
            await server.afork(_exec_away, "sleep", "60", ready="manual")


async def test_exec_before_readiness_is_an_error_where_proc_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_EXIT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(proc, "has_called_exec", lambda _: False)
    with pytest.raises(ChildStartError, match=r"process \d+ called exec, or closed .*notify_ready") as caught:
        await afork(partial(_exec_away, "sleep", "60"), ready="manual")
    assert caught.value.exit_status.returncode == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_fork_by_a_thread_that_c_has_made(loop_factory: LoopFactory) -> None:
    codes: list[int] = []

    def child() -> int:
        thread = threading.Thread(target=int)
        thread.start()
        return 5 if threading.current_thread() is threading.main_thread() else 6

    async def fork_once() -> int:
        return await (await afork(child)).wait()

    def run(_: object) -> None:
        threading.current_thread()
        codes.append(run_on(loop_factory, fork_once()))

    start = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(run)
    pthread, ident = ctypes.PyDLL(None), ctypes.c_ulong()
    pthread.pthread_create(ctypes.byref(ident), None, start, None)
    ctypes.CDLL(None).pthread_join(ident, None)
    assert codes == [5]
