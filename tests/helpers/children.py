"""Children under the control of a test: they block on a pipe until the test writes to it."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Signals that kill, of every kind: with and without a core, and real-time ones.
DEADLY = [1, 2, 3, 4, 6, 8, 9, 10, 11, 13, 14, 15, 31, 34, 50, 64]


class Held:
    """A child that waits for `end(code)`, a signal, or the closing of the test's end of its pipe (code 0)."""

    def __init__(self, program: str = "read code; exit ${code:-0}") -> None:
        read, self.pipe = os.pipe()
        try:
            self.pid = os.posix_spawn("/bin/sh", ["sh", "-c", program], {}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
        finally:
            os.close(read)

    def end(self, code: int) -> None:
        """Let it exit with `code`."""
        os.write(self.pipe, b"%d\n" % code)

    def end_unreaped(self, code: int) -> None:
        """Let it exit, and return once it is a zombie."""
        self.end(code)
        await_zombie(self.pid)

    def close(self) -> None:
        """Close the pipe: a child that still waits exits with 0."""
        os.close(self.pipe)


@contextlib.contextmanager
def held(count: int = 1) -> Iterator[list[Held]]:
    """`count` held children. Those that are left at the end are killed and reaped."""
    made: list[Held] = []
    try:
        for _ in range(count):
            made.append(Held())
        yield made
    finally:
        for child in made:
            child.close()
            with contextlib.suppress(ChildProcessError):  # reaped by the test
                if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG) is None:
                    os.kill(child.pid, signal.SIGKILL)
                    os.waitpid(child.pid, 0)


@contextlib.contextmanager
def one_held() -> Iterator[Held]:
    """One held child."""
    with held() as (child,):
        yield child


def obey(orders: int) -> int:
    """In a forked child: do what ender.c does. Returns the exit code."""
    signal.alarm(120)  # other processes may have copies of the pipe's other end, so its end may never be seen
    # Popen, in another thread of the parent, waits until no process has a copy of its pipe for errors.
    os.closerange(3, orders)
    os.closerange(orders + 1, 4096)
    how, which = os.read(orders, 2)
    if how == ord("x"):
        return which
    with contextlib.suppress(OSError):  # SIGKILL
        signal.signal(which, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.kill(os.getpid(), which)
    return 99


def undebugged_environment() -> dict[str, str]:
    """The environment of this process without asyncio's debug mode, for programs whose calls or output are compared.

    In debug mode a callback that takes long, as any may on a busy machine, is logged, and source files are looked at for it.
    """
    return {**os.environ, "PYTHONASYNCIODEBUG": "", "PYTHONDEVMODE": ""}


def session_members(sid: int) -> list[int]:
    """The processes of a session, including zombies."""
    pids = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                if int(fields[3]) == sid:
                    pids.append(int(entry))
    return pids


@contextlib.contextmanager
def few_descriptors(free: int) -> Iterator[None]:
    """Leave `free` descriptors below the limit, which is 64."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        with contextlib.suppress(OSError):  # EMFILE
            while True:
                held.append(os.dup(0))
        for _ in range(free):
            os.close(held.pop())
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def await_zombie(pid: int) -> None:
    """Return once the child has ended; leave it unreaped."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def state_of(pid: int) -> str:
    """The state of a process in /proc."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        return stat.read().rpartition(")")[2].split()[0]


_TRACER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
pid, PTRACE_SEIZE, WALL = int(sys.argv[1]), 0x4206, 0x40000000
if libc.ptrace(PTRACE_SEIZE, pid, None, None) < 0:
    print(os.strerror(ctypes.get_errno()), flush=True)
    sys.exit()
print("traced", flush=True)
sys.stdin.readline()
os.waitpid(pid, WALL)
sys.stdin.readline()
"""


class Tracer:
    """A process that traces our child. Until it lets go, the exit can be seen, but the child cannot be reaped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        self._orders = process.stdin

    def release(self) -> None:
        """Leave the zombie to us."""
        print(file=self._orders, flush=True)


@contextlib.contextmanager
def traced(pid: int) -> Iterator[Tracer]:
    """A tracer of the child. Skips the test where processes cannot be traced."""
    command = [sys.executable, "-c", _TRACER, str(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        answer = process.stdout.readline().strip()
        if answer != "traced":
            pytest.skip(f"processes cannot be traced here: {answer}")
        yield Tracer(process)


_PARENT = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # it may be inherited ignored
read, write = os.pipe()
argv = sys.argv[1:]
pid = os.posix_spawn(argv[0], argv, {}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
print(pid, flush=True)
for order in sys.stdin:
    if order == "end\\n":
        os.write(write, b"\\n")
    elif order == "reap\\n":
        os.waitpid(pid, 0)
"""


class Stranger:
    """A process that is a child of another process; the test orders its exit (with code 11) and its reaping."""

    def __init__(self, *argv: str) -> None:
        """Start it. `argv` is a program instead of the default one."""
        command = [sys.executable, "-c", _PARENT, *(argv or ("/bin/sh", "-c", "read x; exit 11"))]
        # Not two pipes: if Popen cannot make the second, it leaks the first on Python 3.9 and 3.10.
        self._ours, childs = socket.socketpair()
        with childs, contextlib.ExitStack() as undo:
            undo.callback(self._ours.close)
            self._parent = subprocess.Popen(command, stdin=childs.fileno(), stdout=childs.fileno())
            undo.pop_all()
        self.pid = int(self._ours.recv(32))

    def send(self, order: str) -> None:
        """Send "end" or "reap" to its parent."""
        self._ours.sendall(f"{order}\n".encode())

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ours.close()
        self._parent.wait()
