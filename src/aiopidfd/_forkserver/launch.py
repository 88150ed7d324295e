"""Make the process of a fork server: by clone(2), by os.fork() beside threads, or as a fresh interpreter."""

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
    """How a fork server was made, and what follows for its workers.

    Attributes:
        made_by: "clone": from this process, which had one thread, without an exit signal. "os.fork": from this process,
            which had more. "spawn": a fresh interpreter. "none": there is no server, each worker is made by `afork`.
        sigchld: whether the end of a worker sends SIGCHLD to this process. If it does not, neither somebody's `waitpid(-1)`
            nor an ignored SIGCHLD can take a worker's status away.
        reason: why it was made so, in words.
    """

    made_by: MadeBy
    sigchld: bool
    reason: str


def describe_fallback(reason: OSError) -> ForkServerFeatures:
    """Return the features of no server at all."""
    return ForkServerFeatures("none", True, f"no fork server can be had here, workers are made by afork: {reason}")


def main_module(preload: Sequence[str]) -> dict[str, str]:
    """Return what multiprocessing needs to have our `__main__` in another process, if `preload` asks for it."""
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
    """Make the server process. Return its handle, our end of the control socket, and how it was made.

    Raises OSError: as fork(2), clone(2) or posix_spawn(3).
    """
    ours, theirs = map(_clear_of_streams, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    afork.register_parent_socket(ours)
    try:
        with theirs:
            if method == "spawn":
                features = ForkServerFeatures("spawn", True, "a fresh interpreter was asked for")
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
    """Return `end`, or a copy that replaces it if it has the number of a standard stream, which was closed then."""
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
        "os.fork", True, f"this process had {threads} threads, beside which only os.fork() is safe in C"
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
            except BaseException as exc:  # MemoryError, which is for serve_here() to raise
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
    """Start a fresh interpreter without copying this process, whose size does not matter then."""
    if not sys.executable:
        raise RuntimeError("start_method='spawn' needs sys.executable, the path of the interpreter, and it is not known")
    # As multiprocessing does. A number that the copy does not have: the same one would keep its close-on-exec flag.
    number = control.fileno() + 1
    modules = [name for name in preload if name != "__main__"]
    paths = [path for path in sys.path if isinstance(path, str)]
    program = (
        f"import sys; sys.path[:] = {paths!r}; from {serve.__module__} import main; "
        f"main({number}, {modules!r}, {main_module(preload)!r})"
    )
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined] # what multiprocessing uses, too
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, *flags, "-c", program],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, control.fileno(), number)],
    )
    return watch_forked(pid, pgid=None, check=True)
