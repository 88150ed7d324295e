"""Start the process of a fork server: by clone(2), by os.fork() if there are other threads, or as a new interpreter."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .._fork import afork
from .._fork.child import Options
from .._fork.handle import AbstractChildProcess, watch_forked
from .._kernel import syscalls
from .._kernel.inherited import Snapshot, replace_inherited
from .._kernel.threads import count_threads
from .._watch.registry import Registry
from .._watch.start_gate import StartGate
from .process import serve

StartMethod = Literal["fork", "spawn"]
MadeBy = Literal["clone", "os.fork", "spawn", "none"]


@dataclass(frozen=True)
class ForkServerFeatures:
    """How a fork server was started, and what follows for its workers.

    Attributes:
        made_by: "clone": a fork of this process, which had one thread. "os.fork": a fork of this process, which had several
            threads. "spawn": a new interpreter. "none": there is no server, and afork() makes each worker.
        sigchld: whether this process gets SIGCHLD when a worker exits. If not, the exit status of a worker cannot be lost:
            waitpid(-1) in other code does not reap the worker, and an ignored SIGCHLD has no effect.
        reason: why it was started in this way.
    """

    made_by: MadeBy
    sigchld: bool
    reason: str


def describe_fallback(reason: OSError) -> ForkServerFeatures:
    """Return the features where there is no fork server."""
    return ForkServerFeatures("none", True, f"a fork server is not available, afork() makes the workers: {reason}")


def main_module(preload: Sequence[str]) -> dict[str, str]:
    """Return what multiprocessing needs to import this `__main__` in another process, if `preload` contains it."""
    module = sys.modules["__main__"]
    if "__main__" not in preload:
        return {}
    name = getattr(module.__spec__, "name", None)
    if name is not None:
        return {"init_main_from_name": name}
    path = getattr(module, "__file__", None)
    return {} if path is None else {"init_main_from_path": os.path.abspath(path)}


async def launch(
    loop: asyncio.AbstractEventLoop, method: StartMethod, preload: Sequence[str], *, stacklevel: int
) -> tuple[AbstractChildProcess, socket.socket, ForkServerFeatures]:
    """Start the server process. Return its handle, the parent's control socket, and how the server was started.

    Raises:
        OSError: fork(2), clone(2) or posix_spawn(3) failed.
    """
    ours, theirs = map(_clear_of_streams, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    afork.register_parent_socket(ours)
    try:
        with theirs:
            if method == "spawn":
                features = ForkServerFeatures("spawn", True, "start_method is 'spawn'")
                server = _spawn(theirs, preload)
            else:
                features = _choose_fork()
                server = await _fork_server(loop, theirs, preload, features, stacklevel=stacklevel)
    except BaseException:
        afork.unregister_parent_socket(ours)
        ours.close()
        raise
    return server, ours, features


def _clear_of_streams(end: socket.socket) -> socket.socket:
    """Return `end`, or a copy of it if its number is that of a standard stream. Then that stream was closed."""
    if end.fileno() > 2:
        return end
    with end:
        return socket.socket(fileno=fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))


def _choose_fork() -> ForkServerFeatures:
    count = count_threads()
    if count == 1:
        return ForkServerFeatures("clone", False, "this process had one thread")
    threads = "an unknown number of" if count is None else count
    return ForkServerFeatures(
        "os.fork", True, f"this process had {threads} threads, and the C library supports only fork() then"
    )


async def _fork_server(
    loop: asyncio.AbstractEventLoop,
    control: socket.socket,
    preload: Sequence[str],
    features: ForkServerFeatures,
    *,
    stacklevel: int,
) -> AbstractChildProcess:
    inherited: list[int] | BaseException = []

    how = afork.fork if features.made_by == "os.fork" else afork.clone

    def fork(registry: Registry, gate: StartGate, child_main: syscalls.ChildMain) -> None:
        snapshot = Snapshot()

        def find_and_run(fd: int, mask: int) -> None:
            nonlocal inherited
            try:
                inherited = snapshot.find_inherited()
            except BaseException as exc:  # MemoryError: serve_here() raises it
                inherited = exc
            snapshot.close()
            child_main(fd, mask)

        try:
            how(registry, gate, find_and_run)
        finally:
            snapshot.close()

    def serve_here() -> None:
        if isinstance(inherited, BaseException):
            raise inherited
        replace_inherited(inherited, control.fileno())
        serve(control, [name for name in preload if name != "__main__"])

    if features.made_by == "os.fork":
        afork.warn_of_threads(stacklevel)
    return await afork.start_child(loop, serve_here, Options(), fork)


def _spawn(control: socket.socket, preload: Sequence[str]) -> AbstractChildProcess:
    """Start a new interpreter by posix_spawn(3), which does not copy this process."""
    if not sys.executable:
        raise RuntimeError("start_method='spawn' requires sys.executable, the path of the interpreter")
    # The descriptor gets another number in the new process. dup2() to the same number would leave close-on-exec set.
    number = control.fileno() + 1
    modules = [name for name in preload if name != "__main__"]
    paths = [path for path in sys.path if isinstance(path, str)]
    program = (
        f"import sys; sys.path[:] = {paths!r}; from {serve.__module__} import main; "
        f"main({number}, {modules!r}, {main_module(preload)!r})"
    )
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined] # multiprocessing uses it
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, *flags, "-c", program],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, control.fileno(), number)],
    )
    return watch_forked(pid, pgid=None, check=True)
