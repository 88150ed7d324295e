"""The children of a cell: tiny programs that live until a pipe is closed, so that none outlives the cell."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

# Where the compiled programs are; `cell` sets it. The cells find it here since it is the same for all of them.
PROGRAMS_VARIABLE: Final = "AIOPIDFD_BENCH_PROGRAMS"


def find_program(name: str) -> str:
    """Return the path of a compiled program."""
    return str(Path(os.environ[PROGRAMS_VARIABLE]) / name)


def raise_descriptor_limit() -> None:
    """Allow as many descriptors as the hard limit does: a peer with one per child needs more than 10,000."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def start(stdin: int, *, keep: int | None = None) -> int:
    """Start a child that ends when nobody can write to `stdin` any more; return its pid. `keep` stays open in it."""
    program = find_program("child")
    actions = [(os.POSIX_SPAWN_DUP2, stdin, 0)]
    if keep is not None:
        actions.append((os.POSIX_SPAWN_DUP2, keep, 3))
    return os.posix_spawn(program, [program], {}, file_actions=actions)


def await_end(pid: int) -> None:
    """Block until a child has ended; it stays to be reaped."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


class Gate:
    """A pipe that children read, to be released all at once.

    What holds its other end open is itself a child, the holder: so the CPU time of waking the others, which the benchmarks
    do not mean to measure, is the holder's. If this process dies the holder ends, and then the rest.
    """

    def __init__(self) -> None:
        self.stdin, self._writer = os.pipe()
        holder_stdin, self._trigger = os.pipe()
        self._holder = start(holder_stdin, keep=self._writer)
        os.close(holder_stdin)
        os.close(self._writer)

    def open(self) -> None:
        """Let the children go. One system call."""
        os.close(self._trigger)

    def close(self) -> None:
        """Reap the holder."""
        os.close(self.stdin)
        os.waitpid(self._holder, 0)
