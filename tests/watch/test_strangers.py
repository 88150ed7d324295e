"""Processes that are no children of ours: alive, half dead and dead; where /proc shows them and where it does not."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiopidfd import PidfdWatcher, PosixChildProcess, features, wait
from aiopidfd._backends import sigchld_backend
from aiopidfd._kernel import proc
from aiopidfd._kernel.exit_status import ExitStatus
from aiopidfd._kernel.proc import ProcState, read_state
from aiopidfd._kernel.syscalls import can_recover_exit
from aiopidfd._watch.registries import registry_of

from ..conftest import LoopFactory
from ..helpers.children import Stranger, one_held
from ..helpers.subprocesses import needs_root

FOUND_BY_CHECK_S = 20.0  # a second, but for a busy machine

# Its main thread ends at once; another one lives until there is something to read.
_HEADLESS = """
import ctypes, os, threading
def live():
    os.read(0, 1)
    os._exit(11)
threading.Thread(target=live).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def check_now() -> None:
    """Do the check of once a second, if there is one."""
    registry = registry_of(asyncio.get_running_loop())
    if registry._sigchld is not None:
        with registry._lock:
            registry._take_records(registry._sigchld.check())
    registry.collect()


def is_zombie(pid: int) -> bool:
    """Whether its main thread has ended."""
    return b" Z " in Path(f"/proc/{pid}/stat").read_bytes()


async def watch(stranger: Stranger) -> asyncio.Task[ExitStatus]:
    """What waits for it."""
    waiting = asyncio.ensure_future(wait(stranger.pid))
    await asyncio.sleep(0)
    return waiting


async def end_and_reap(stranger: Stranger, waiting: asyncio.Task[ExitStatus], backend: str) -> None:
    """Have it exit, and check that the exit is reported as far as it can be known here."""
    stranger.send("end")
    stranger.send("reap")
    status = await asyncio.wait_for(waiting, FOUND_BY_CHECK_S)
    if backend == "pidfd" and can_recover_exit():
        assert (status.returncode, status.source) == (11, "recovered")
    else:
        assert (status.returncode, status.source) == (None, "not-child")


async def test_stranger_whose_main_thread_has_ended_is_alive(backend: str) -> None:
    with Stranger(sys.executable, "-c", _HEADLESS) as stranger:
        deadline = time.monotonic() + 20
        while not is_zombie(stranger.pid):
            assert time.monotonic() < deadline
        waiting = await watch(stranger)
        check_now()
        await asyncio.sleep(0)
        assert not waiting.done()
        await end_and_reap(stranger, waiting, backend)


async def test_zombie_of_another_process_is_reported_though_it_was_one_before() -> None:
    with Stranger() as stranger:
        stranger.send("end")
        while not (read_state(stranger.pid) or ProcState(None, has_ended=True)).has_ended:
            pass
        status = await asyncio.wait_for(wait(stranger.pid), FOUND_BY_CHECK_S)
        assert (status.returncode, status.source) == (None, "not-child")


async def test_id_of_a_thread_is_no_process() -> None:
    ids: list[int] = []
    started, end = threading.Event(), threading.Event()

    def live() -> None:
        ids.append(threading.get_native_id())
        started.set()
        end.wait()

    thread = threading.Thread(target=live)
    thread.start()
    started.wait()
    try:
        with pytest.raises(ProcessLookupError):
            await wait(ids[0])
        with pytest.raises(ProcessLookupError):
            PidfdWatcher().add_child_handler(ids[0], print)
    finally:
        end.set()
        thread.join()


async def test_stranger_can_be_waited_for_without_a_descriptor_to_look_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at later."""
    monkeypatch.setenv("AIOPIDFD_BACKEND", "auto")
    with Stranger() as stranger:
        registry_of(asyncio.get_running_loop())
        with no_descriptors():
            waiting = await watch(stranger)
            check_now()
        check_now()
        await asyncio.sleep(0)
        assert not waiting.done()
        stranger.send("end")
        status = await asyncio.wait_for(waiting, FOUND_BY_CHECK_S)  # though nobody has reaped it: so it was looked at
        assert (status.returncode, status.source) == (None, "not-child")


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Have no descriptor left."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_number_of_a_stranger_that_another_process_has_got_is_its_end(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "pidfd":
        pytest.skip("a pidfd is not fooled by numbers")
    with Stranger() as stranger:
        waiting = await watch(stranger)
        monkeypatch.setattr(sigchld_backend, "read_state", lambda pid: ProcState(b"another time", has_ended=False))
        check_now()
        assert (await waiting).source == "not-child"


def test_what_can_be_seen_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own = read_state(os.getpid())
    assert own is not None
    assert own.start_time
    assert not own.has_ended
    with one_held() as child:
        child.end_unreaped(0)
        seen = read_state(child.pid)
        assert seen is not None
        assert seen.has_ended
        monkeypatch.setattr(proc, "_find_mismatch", lambda: "is that of another PID namespace")
        assert read_state(child.pid) == ProcState(None, has_ended=False)
        os.waitpid(child.pid, 0)
        assert read_state(child.pid) is None


# Signals that are not permitted


async def test_signal_that_is_not_permitted_is_not_blamed_on_an_old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with one_held() as held:
        child = PosixChildProcess(held.pid)
        with monkeypatch.context() as patched:
            patched.setattr(os, "kill", refuse)
            with pytest.raises(PermissionError, match="runs as another user") as raised:
                child.terminate()
        assert "5.4" not in str(raised.value)
        held.end(0)
        await child.wait()


# Odd kinds of /proc. `python` runs as init of its namespaces; what waits there is its child, and not root.

_WORLDS = {
    "no /proc": "unshare -m sh -c 'mount -t tmpfs none /proc && exec \"$@\"' sh",
    "of another namespace": "unshare -p -f",
    "hidepid=1": "unshare -p -m -f sh -c 'mount -t proc -o hidepid=1 none /proc && exec \"$@\"' sh",
    "hidepid=2": "unshare -p -m -f sh -c 'mount -t proc -o hidepid=2 none /proc && exec \"$@\"' sh",
}

_PROGRAM = """
import asyncio, os, subprocess, sys
import aiopidfd
from aiopidfd._kernel import syscalls
from aiopidfd._watch.registries import registry_of
stranger = subprocess.Popen(["/bin/sh", "-c", "read x; exit 11"], stdin=subprocess.PIPE)
read, write = os.pipe()
async def main():
    loop = asyncio.get_running_loop()
    print(aiopidfd.features().proc)
    child = subprocess.Popen(["/bin/sh", "-c", "exit 7"])
    status = await aiopidfd.wait(child.pid)
    print(status.returncode, status.source)
    waiting = asyncio.ensure_future(aiopidfd.wait(stranger.pid))
    await asyncio.sleep(0)
    backend = registry_of(loop)._sigchld
    print([] if backend is None else list(backend.check()))
    try:
        syscalls.send_signal(syscalls.open_pidfd(stranger.pid), 0)
    except PermissionError as exc:
        print("5.4" in str(exc))
    os.write(write, b"x")
    status = await asyncio.wait_for(waiting, 10)
    print(status.returncode, status.source)
IMPORT
if os.fork() == 0:
    os.setgid(65534)
    os.setuid(65534)
    loop = MAKE_LOOP()
    loop.run_until_complete(main())
    loop.close()
    sys.stdout.flush()
    os._exit(0)
os.close(write)
os.read(read, 1)
stranger.communicate(b"x\\n")
sys.exit(os.wait()[1])
"""


@needs_root
@pytest.mark.parametrize("world", _WORLDS)
def test_children_and_strangers_are_waited_for_whatever_proc_shows(
    world: str, loop_factory: LoopFactory, backend: str
) -> None:
    command = f'exec {_WORLDS[world]} "$@"'
    if subprocess.run(["sh", "-c", command, "sh", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("namespaces cannot be made here")
    module, name = loop_factory.__module__, loop_factory.__qualname__
    program = _PROGRAM.replace("IMPORT", f"import {module} as m").replace("MAKE_LOOP", f"m.{name}")
    result = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    proc, own, checked, blames_kernel, ended = result.stdout.splitlines()
    assert proc != "yes"
    assert own == "7 reaped"
    assert checked == "[]"
    assert blames_kernel == "False"
    assert ended == ("11 recovered" if backend == "pidfd" and can_recover_exit() else "None not-child")


def test_features_say_that_proc_can_be_used() -> None:
    assert features().proc == "yes"
