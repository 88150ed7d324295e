"""The interface between a loop's registry and what watches its children, and the choice between the two backends."""

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
    """Watches the children of one loop. It knows pids and flags, not observers.

    Every method is called under the lock of the registry. The reaper of the loop reports each added child once, unless it is
    removed first.
    """

    __slots__ = ()

    name: ClassVar[BackendName]

    @abstractmethod
    def add(self, pid: int, flags: int) -> int:
        """Watch `pid`. Return its pidfd, or -1 if this backend uses none. `flags` are ADD_* of reaper.py.

        Raises OSError: ESRCH, there is no such process. ECHILD, it is not a child of this one and ADD_CHECK_CHILD was given.
        EMFILE, ENFILE: out of descriptors. ENOSYS, EPERM, EACCES, EINVAL: this backend cannot work here.
        """

    @abstractmethod
    def adopt(self, pid: int, pidfd: int, flags: int) -> int:
        """Watch `pid` by an open pidfd, which the backend owns if this succeeds. Return it, or -1. Raises as `add`."""

    @abstractmethod
    def modify(self, pid: int, pidfd: int, flags: int) -> None:
        """Change the flags of a watched child. They also apply if it has ended and is not reported yet."""

    @abstractmethod
    def remove(self, pid: int, pidfd: int) -> None:
        """Stop watching `pid`, and close its pidfd."""

    def is_recycled(self, pid: int, pidfd: int) -> bool:
        """Return whether `pid` belongs to another process than the watched one. False if that cannot be known."""
        return False

    @abstractmethod
    def send_signal(self, pid: int, pidfd: int, signal: int) -> None:
        """Signal a watched child, and no other process. ESRCH: the child has been reaped."""

    @abstractmethod
    def signal_group(self, pid: int, pidfd: int, pgid: int, signal: int) -> None:
        """Signal the process group `pgid` of which a watched child is a member. ESRCH: the child has been reaped."""


def check_choice(choice: object, where: str = "backend") -> Choice:
    """Return `choice` if it is the name of a backend, or "auto". ValueError if not."""
    if choice == "auto" or choice == "pidfd" or choice == "sigchld":  # noqa: PLR1714 - so that mypy sees the literals
        return choice
    raise ValueError(f"{where} must be 'auto', 'pidfd' or 'sigchld', not {choice!r}")


def probe_pidfd() -> OSError | None:
    """Try with a pidfd of this process whether children can be watched by pidfd. Return None, or the error.

    ENOSYS, EPERM, EACCES from pidfd_open or waitid: an old kernel, or a filter. EINVAL from waitid: Linux 5.3.
    """
    try:
        pidfd = syscalls.open_pidfd(os.getpid())
    except OSError as exc:
        # EMFILE, ENFILE: nothing is known about the kernel. Each child is tried again.
        return None if exc.errno in syscalls.OUT_OF_DESCRIPTORS else exc
    try:
        _try_signal(pidfd)
        syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:  # this process is not its own child: the call works
        pass
    except OSError as exc:
        if exc.errno == errno.EINVAL:
            return OSError(exc.errno, "waitid(P_PIDFD): pidfds are not available here (waiting by pidfd needs Linux 5.4)")
        return exc
    finally:
        os.close(pidfd)
    return None


def _try_signal(pidfd: int) -> None:
    """Send signal 0 to this process. If that fails, the kernel is too old or a filter forbids the call."""
    try:
        syscalls.send_signal(pidfd, 0)
    except OSError as exc:
        raise syscalls.error(exc.errno or errno.EINVAL, "pidfd_send_signal(to this process)") from None


def environment() -> Choice:
    """Return the backend that the environment variable names, or "auto". ValueError: it names no backend."""
    return check_choice(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


def decide() -> tuple[BackendName, str]:
    """Return the backend that the environment asks for, or the one that works here, and the reason."""
    wanted = environment()
    if wanted != "auto":
        return wanted, f"{ENVIRONMENT} is set"
    obstacle = probe_pidfd()
    if obstacle is None:
        return "pidfd", "processes can be opened, waited for and signalled by pidfd"
    return "sigchld", str(obstacle.strerror)


class Decision:
    """The meaning of "auto" in this process: decided at first use, and again after errors that may change it."""

    def __init__(self) -> None:
        self.name: BackendName | None = None
        self.logged: set[BackendName] = set()

    def make(self) -> BackendName:
        """Decide, log the decision, and return it."""
        require(environment())
        self.name, reason = decide()
        self.log(self.name, reason)
        return self.name

    def log(self, name: BackendName, reason: str) -> None:
        """Log that a backend is used, and why. Once for each backend."""
        if name not in self.logged:
            self.logged.add(name)
            logger.info("watching children by %s: %s", name, reason)


decision = Decision()


def choose(choice: Choice) -> BackendName:
    """Return the backend to try first for a child. OSError: the environment demands pidfds, and they are forbidden."""
    if choice == "auto":
        return decision.name or decision.make()
    if choice not in decision.logged:
        decision.log(choice, f"backend={choice!r} was passed")
    return choice


def require(choice: Choice) -> None:
    """Raise OSError if `choice` (or, for "auto", the environment) demands pidfds and they are forbidden here."""
    if (environment() if choice == "auto" else choice) == "pidfd":
        obstacle = probe_pidfd()
        if obstacle is not None:
            raise obstacle


def is_forbidden(exc: OSError) -> bool:
    """Return whether an error from watching a child by pidfd means that pidfds are forbidden from now on."""
    return (exc.errno in syscalls.FORBIDDEN or exc.errno == errno.EINVAL) and decision.make() == "sigchld"
