"""afork where /proc or /dev is missing, or shows another world: os.fork works there, and so does afork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import BACKENDS, LOOPS

# Makes the world, forks in it, and looks in the child whether the parent's epoll descriptors are out of reach.
_PROGRAM = """
import asyncio, ctypes, encodings.idna, fcntl, os, select, sys, traceback
import aiopidfd
world, loop_kind, empty = sys.argv[1:]
factory = aiopidfd.UvloopEventLoop if loop_kind == "uvloop" else aiopidfd.SelectorEventLoop
libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWPID, MS_REC, MS_PRIVATE = 0x20000, 0x20000000, 0x4000, 1 << 18

def check(result):
    if result < 0:
        print("cannot:", os.strerror(ctypes.get_errno()))
        raise SystemExit(0)

def mount(kind, where, options=None):
    check(libc.mount(b"none", where, kind, 0, options))

def enter():
    if world == "chroot":
        os.chroot(empty)
        os.chdir("/")
        return
    if world == "pid namespace without its proc":
        check(libc.unshare(CLONE_NEWPID))
        pid = os.fork()
        if pid:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    if world == "no proc":
        mount(b"tmpfs", b"/proc")
    elif world == "no dev":
        mount(b"tmpfs", b"/dev")
    elif world == "hidepid":
        mount(b"proc", b"/proc", b"hidepid=2")
        os.setgid(65534)
        os.setuid(65534)
    else:
        assert world == "proc of another pid namespace"
        pid = os.fork()
        if pid == 0:
            check(libc.unshare(CLONE_NEWPID))
            pid = os.fork()  # the first process in there
            if pid == 0:
                mount(b"proc", b"/proc")
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        assert os.waitpid(pid, 0)[1] == 0
        assert not os.path.exists("/proc/self/")

epoll = select.epoll()
pipe, _ = os.pipe()
numbers = [epoll.fileno(), *[fcntl.fcntl(epoll, fcntl.F_DUPFD_CLOEXEC, lowest) for lowest in (200, 255, 256, 900)]]

def child():
    for number in numbers:
        assert os.fstat(number)  # its number is not free
        try:
            select.epoll.fromfd(os.dup(number)).register(pipe, 0)
        except OSError as exc:
            assert exc.errno == 22, exc
        else:
            return 8
    return 7

async def main():
    return [await (await aiopidfd.afork(child)).wait() for _ in range(2)]

try:
    aiopidfd.run(asyncio.sleep(0), loop_factory=factory)
    enter()
    print(aiopidfd.run(main(), loop_factory=factory))
except SystemExit:
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make such worlds")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize(
    "world", ["no proc", "no dev", "chroot", "hidepid", "proc of another pid namespace", "pid namespace without its proc"]
)
def test_afork_works_in(world: str, kind: str, backend: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", _PROGRAM, world, kind, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if ran.stdout.startswith("cannot: "):
        pytest.skip(f"such a world cannot be made here: {ran.stdout.strip()}")
    assert (ran.stdout, ran.stderr) == ("[7, 7]\n", "")
