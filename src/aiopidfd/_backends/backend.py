"""The contract between a loop's registry and the mechanism that watches a child; which mechanism that is."""

from __future__ import annotations

import errno
import logging
import os
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from .._kernel import syscalls

logger = logging.getLogger("aiopidfd")

BackendName = Literal["pidfd", "sigchld"]
Choice = Literal["auto", "pidfd", "sigchld"]

ENVIRONMENT = "AIOPIDFD_BACKEND"


class Backend(ABC):
    """One loop's way to watch children. It knows pids and flags, not observers.

    Every method is called under its registry's lock. What was added is reported by the loop's reaper once, or removed.
    """

    __slots__ = ()

    name: ClassVar[BackendName]

    @abstractmethod
    def add(self, pid: int, flags: int) -> int:
        """Watch `pid` (flags: ADD_* of syscalls); return its pidfd, or -1 if this backend has none.

        Raises OSError: ESRCH, there is no such process. ECHILD, it is not our child and ADD_CHECK_CHILD was given.
        EMFILE, ENFILE: out of descriptors. ENOSYS, EPERM, EACCES, EINVAL: this backend cannot work here.
        """

    @abstractmethod
    def adopt(self, pid: int, pidfd: int, flags: int) -> int:
        """Watch `pid`, of which a pidfd is open, ours if this succeeds; return it, or -1. Raises as `add`."""

    @abstractmethod
    def modify(self, pid: int, pidfd: int, flags: int) -> None:
        """Change the flags of a watched child; if it has ended already it is reported according to the new ones."""

    @abstractmethod
    def remove(self, pid: int, pidfd: int) -> None:
        """Watch `pid` no longer, and close its pidfd."""

    def is_recycled(self, pid: int, pidfd: int) -> bool:
        """Return whether somebody else has reaped a watched child and `pid` is another process's, if that can be known."""
        return False

    @abstractmethod
    def send_signal(self, pid: int, pidfd: int, signal: int) -> None:
        """Signal a watched child and nobody else. ESRCH: it has been reaped."""

    @abstractmethod
    def signal_group(self, pid: int, pidfd: int, pgid: int, signal: int) -> None:
        """Signal the process group `pgid` of which a watched child is a member. ESRCH: the child has been reaped."""


def check_choice(choice: object, where: str = "backend") -> Choice:
    """Return `choice` if it is one. ValueError if not."""
    if choice == "auto" or choice == "pidfd" or choice == "sigchld":  # noqa: PLR1714 - so that mypy sees the literals
        return choice
    raise ValueError(f"{where} must be 'auto', 'pidfd' or 'sigchld', not {choice!r}")


def probe_pidfd() -> OSError | None:
    """Try on this process whether children can be watched by pidfd; return None, or why not.

    ENOSYS, EPERM, EACCES from pidfd_open or waitid: an old kernel, or a filter. EINVAL from waitid: Linux 5.3.
    """
    try:
        pidfd = syscalls.open_pidfd(os.getpid())
    except OSError as exc:
        # Short of descriptors says nothing about the kernel; each child will try again.
        return None if exc.errno in syscalls.OUT_OF_DESCRIPTORS else exc
    try:
        _try_signal(pidfd)
        syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:  # we are not our own child: it works
        pass
    except OSError as exc:
        if exc.errno == errno.EINVAL:
            return OSError(
                exc.errno, "waitid(P_PIDFD): pidfds are not available here (Linux before 5.4 cannot wait by them)"
            )
        return exc
    finally:
        os.close(pidfd)
    return None


def _try_signal(pidfd: int) -> None:
    """Signal this very process; if that fails it is the kernel's fault, or a filter's."""
    try:
        syscalls.send_signal(pidfd, 0)
    except OSError as exc:
        raise syscalls.error(exc.errno or errno.EINVAL, "pidfd_send_signal(to this process)") from None


def environment() -> Choice:
    """Return what the environment says. ValueError: nothing that can be chosen."""
    return check_choice(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


def decide() -> tuple[BackendName, str]:
    """Return the backend that the environment asks for, or else the one that works here, and why."""
    wanted = environment()
    if wanted != "auto":
        return wanted, f"{ENVIRONMENT} says so"
    obstacle = probe_pidfd()
    if obstacle is None:
        return "pidfd", "processes can be opened, waited for and signalled by pidfd"
    return "sigchld", str(obstacle.strerror)


class Decision:
    """What "auto" means in this process: decided at first use, and again when a call fails in a way that may change it."""

    def __init__(self) -> None:
        self.name: BackendName | None = None
        self.logged: set[BackendName] = set()

    def make(self) -> BackendName:
        """Decide, and log it."""
        require(environment())
        self.name, reason = decide()
        self.log(self.name, reason)
        return self.name

    def log(self, name: BackendName, reason: str) -> None:
        """Log, once for each backend, that it is used, and why."""
        if name not in self.logged:
            self.logged.add(name)
            logger.info("watching children by %s: %s", name, reason)


decision = Decision()


def choose(choice: Choice) -> BackendName:
    """Return the backend to try first for a child. OSError: the environment insists on pidfds, and they are forbidden."""
    if choice == "auto":
        return decision.name or decision.make()
    if choice not in decision.logged:
        decision.log(choice, f"backend={choice!r} says so")
    return choice


def require(choice: Choice) -> None:
    """Raise OSError if `choice`, or for "auto" the environment, insists on pidfds and they are forbidden here."""
    if (environment() if choice == "auto" else choice) == "pidfd":
        obstacle = probe_pidfd()
        if obstacle is not None:
            raise obstacle


def is_forbidden(exc: OSError) -> bool:
    """Return whether `exc`, from watching a child by pidfd, means that pidfds are forbidden here from now on."""
    return (exc.errno in syscalls.FORBIDDEN or exc.errno == errno.EINVAL) and decision.make() == "sigchld"
