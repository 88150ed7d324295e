"""The contract between a loop's registry and the mechanism that tells it of exits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

BackendName = Literal["pidfd", "sigchld"]

# pid, pidfd (-1: none), wait status, source (SOURCE_* of _linux), rusage
Record = tuple[int, int, int, int, bytes]


class Backend(ABC):
    """One loop's way to hear that processes have ended.

    A backend has one descriptor, readable when there is something to reap. It knows pids and flags, not observers.
    Every method but `fileno` is called under its registry's lock. A child that was added is never dropped: it is reported
    once by `reap`, or removed.
    """

    __slots__ = ()

    name: ClassVar[BackendName]

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor for the loop's `add_reader`; -1 once closed."""

    @abstractmethod
    def add(self, pid: int, flags: int) -> int:
        """Watch `pid` (flags: ADD_* of _linux); return its pidfd, or -1 if this backend has none.

        Raises OSError: ESRCH, there is no such process. ECHILD, it is not our child and ADD_CHECK_CHILD was given.
        EMFILE, ENFILE: out of descriptors. ENOSYS, EPERM, EACCES, EINVAL: this backend cannot work here.
        """

    @abstractmethod
    def adopt(self, pid: int, pidfd: int, flags: int) -> None:
        """Watch `pid` by an open pidfd. Raises as `add`; the pidfd then stays open, and the caller's."""

    @abstractmethod
    def modify(self, pid: int, pidfd: int, flags: int) -> None:
        """Change the flags of a watched child; if it has ended already it is reported according to the new ones."""

    @abstractmethod
    def remove(self, pid: int, pidfd: int) -> None:
        """Watch `pid` no longer, and close its pidfd."""

    @abstractmethod
    def reap(self) -> Iterator[Record]:
        """Reap a batch of what has ended and return it. It is returned again until `release`: an interrupt loses nothing."""

    @abstractmethod
    def keep_open(self, pidfd: int) -> None:
        """Do not close `pidfd` in the next `release`."""

    @abstractmethod
    def release(self) -> None:
        """Forget the batch, and close its pidfds. From here on these may name other processes."""

    @abstractmethod
    def send_signal(self, pid: int, pidfd: int, signal: int) -> None:
        """Signal a watched child and nobody else. ESRCH: it has been reaped."""

    @abstractmethod
    def signal_group(self, pid: int, pidfd: int, pgid: int, signal: int) -> None:
        """Signal the process group `pgid` of which a watched child is a member. ESRCH: the child has been reaped."""

    @abstractmethod
    def close(self) -> None:
        """Close the descriptor. Pidfds are their registry's to close."""
