"""`ForkServer`: fork workers from a small process instead of from this one."""

from __future__ import annotations

import asyncio
import errno
import functools
import signal
import warnings
from collections.abc import Callable, Iterable
from contextvars import Context
from types import TracebackType

from .._backends.backend import choose, probe_pidfd
from .._fork.afork import ChildStartError, afork, check_arguments, kill, kill_and_reap
from .._fork.child import Options, Ready
from .._fork.handle import AbstractChildProcess
from .._kernel import syscalls
from .._kernel.exit_status import ExitStatus
from .._watch.child import Child
from .._watch.registries import registry_of
from .launch import ForkServerFeatures, StartMethod, describe_fallback, launch
from .link import Link
from .pickling import pickle_call
from .process import MAX_FDS
from .request import Request

# Errors of clone(2) with CLONE_PIDFD and CLONE_PARENT that do not go away: the system call is unsupported or forbidden here.
_UNSUPPORTED = syscalls.FORBIDDEN | {errno.EINVAL, errno.ENOTSUP}


Workers = dict[object, "tuple[asyncio.Future[ExitStatus], Child]"]
"""Workers that have not exited, by their exit observer. Their handles may be dropped."""


class ForkServer:
    """A small process with one thread that forks workers for this process.

    `afork()` forks this process. That takes longer the more memory it uses, and is unsafe if it has other threads. A fork
    server forks itself. Its workers are children of *this* process, as those of `afork()`.

        async with ForkServer() as server:
            async with await server.afork(function, argument) as worker:
                ...

    Start it early. With the start method "fork", the server is a copy of this process at that moment. If this process has
    one thread then, other code cannot reap the workers. With "spawn", the server is a new interpreter. It takes longer to
    start, but it is small and safe at any time.

    One idle worker is forked before it is needed. So the next call of `afork()` does not wait for a fork, unless it has
    `pass_fds`.

    The server closes descriptors for which another process may wait: pipes, sockets, terminals and locked files. It keeps
    the standard streams. With "fork", it also keeps other regular files and directories, such as log files, and the closed
    numbers are opened on /dev/null. Use `pass_fds` for everything else that a worker needs.

    The server exits when this object is closed or dropped, when its loop is closed, and when this process exits. Workers are
    independent of it: they run on, also if the server is killed.
    """

    _link: Link | None = None  # until the server is started, so that a constructor that fails gives no ResourceWarning

    def __init__(
        self,
        *,
        preload: Iterable[str] = (),
        start_method: StartMethod = "fork",
        restart: bool = False,
        fallback: bool = False,
    ) -> None:
        """Set the options. `async with` starts the server.

        Args:
            preload: modules that the server imports, so that the workers need not. With "spawn", "__main__" stands for this
                program's main module. As in multiprocessing, its name is `__mp_main__` in the server.
            start_method: "fork" or "spawn".
            restart: if the server has exited, start a new one at the next call of `afork()`.
            fallback: if a fork server is not available here, make each worker by `aiopidfd.afork()`.
        """
        if isinstance(preload, str):
            raise TypeError("preload must be an iterable of module names, not a str")
        if start_method not in ("fork", "spawn"):
            raise ValueError(f"start_method must be 'fork' or 'spawn', not {start_method!r}")
        self._preload = tuple(preload)
        self._method: StartMethod = start_method
        self._restart = restart
        self._fallback = fallback
        self._loop: asyncio.AbstractEventLoop | None = None
        self._features: ForkServerFeatures | None = None
        self._server: AbstractChildProcess | None = None
        self._closed = False
        self._workers: Workers = {}

    def __repr__(self) -> str:
        state = "closed" if self._closed else "not started" if self._features is None else self._features.made_by
        return f"<ForkServer pid={self.pid} {state}>"

    def __del__(self) -> None:
        link = self._link
        if link is not None and not self._closed and (link.error is None or link.is_loop_closed):
            warnings.warn(
                f"{self!r} was dropped (call close() first, or use async with)", ResourceWarning, source=self, stacklevel=2
            )
            link.drop()

    async def __aenter__(self) -> ForkServer:
        """Start the server.

        With the start method "fork", the loop is blocked for as long as a fork of this process takes.

        Raises:
            ChildStartError: the server exited before it was ready. If a module could not be imported, the message has the
                traceback.
            OSError: ENOSYS, EPERM, EACCES: pidfds, or clone(2) with CLONE_PIDFD, are unavailable. EINVAL: the server is the
                init process of a PID namespace. ENOTSUP: see `ap_fork` in clone.h. EAGAIN, ENOMEM, EMFILE, ENFILE: as for
                fork(2).
        """
        if self._loop is not None:
            raise RuntimeError("a ForkServer can only be started once")
        self._loop = asyncio.get_running_loop()
        self._lock = asyncio.Lock()
        await self._start(self._loop, stacklevel=6)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def pid(self) -> int | None:
        """The process ID of the server; None if there is none."""
        return None if self._server is None or self._server.returncode is not None else self._server.pid

    @property
    def features(self) -> ForkServerFeatures:
        """How the server was started. Raises RuntimeError if it is not started."""
        if self._features is None:
            raise RuntimeError("the fork server is not started (use async with)")
        return self._features

    async def afork(
        self,
        child_func: Callable[..., int | None],
        *args: object,
        ready: Ready = "auto",
        start_new_session: bool = False,
        process_group: int | None = None,
        pdeathsig: int | None = None,
        pass_fds: Iterable[int] = (),
    ) -> AbstractChildProcess:
        """Run `child_func(*args)` in a new child of this process, and return its handle once the child is ready.

        This differs from `aiopidfd.afork()`: `child_func` and `args` are pickled. If pickle cannot pickle them, cloudpickle
        is used if it is installed. With ready="auto", the child is ready after it has unpickled them. It has the server's
        standard streams, environment and working directory.

        Args:
            ready, start_new_session, process_group: as for `aiopidfd.afork()`.
            pdeathsig: the signal that the child gets when the *thread* that started the server exits.
            pass_fds: descriptors that the child gets, with the same numbers.

        Raises:
            pickle.PicklingError: `child_func` or `args` cannot be pickled. Nothing was sent.
            TypeError, ValueError: another argument is invalid. Nothing was sent.
            ChildStartError: the child exited before it was ready. The message has its traceback if there is one.
            ConnectionResetError: the server has exited. There is no child.
            OSError: EAGAIN, ENOMEM, EMFILE, ENFILE: as for fork(2), in this process or in the server. ENOTSUP: the server is
                in another PID namespace, and the pid of the worker in this one is unknown (before Linux 6.13, without
                /proc).
            RuntimeError: the server is not started, or is closed, or belongs to another loop.

        Cancellation kills and reaps the child if it is not ready yet. If the server is stopped and does not reply within a
        second, the child is killed when the server replies.
        """
        options = Options(ready, start_new_session, process_group, pdeathsig)
        check_arguments(child_func, options)
        fds = _check_fds(pass_fds)
        loop = asyncio.get_running_loop()
        self._check_usable(loop)
        if self.features.made_by == "none":
            child = await afork(functools.partial(child_func, *args), **options._asdict())
            _track_worker(self._workers, child)
            return child
        has_main = self._method == "fork" or "__main__" in self._preload
        body = pickle_call(child_func, args, has_main=has_main)
        link = await self._get_link(loop)
        request = link.pop_idle() if not fds else Request(loop, fds)
        try:
            request.assign(body, options, functools.partial(_track_worker, self._workers))
            if fds:
                link.submit(request)
            link.prefork()
            return await request.wait()
        except BaseException:
            await request.kill_and_reap()
            raise
        finally:
            request.close()

    async def close(self, *, stop_workers: bool = False, grace: float = 5.0) -> None:
        """Have the server exit after it has served the requests that were sent. Workers run on.

        Args:
            stop_workers: send SIGTERM to the workers, and SIGKILL to those that run after `grace` seconds.
            grace: how many seconds the server, and then the workers, may take to exit.
        """
        self._closed = True
        link, server = self._link, self._server
        if link is not None and server is not None and not link.is_loop_closed:
            reason = OSError(errno.ESHUTDOWN, f"the fork server (pid {server.pid}) is closed")
            link.close_sending()
            try:
                await asyncio.wait([server._exit.future], timeout=grace)
            finally:
                kill(server)
                link.on_server_exit(reason)
            await kill_and_reap(server)
            await link.kill_and_reap_idle()
        if stop_workers and self._loop is not None:
            await self._stop_workers(self._loop, grace)

    async def _start(self, loop: asyncio.AbstractEventLoop, *, stacklevel: int) -> None:
        obstacle: OSError | None = None
        if choose("auto") != "pidfd":
            obstacle = probe_pidfd() or OSError(
                errno.ENOSYS, "a fork server requires the pidfd backend, and the backend is sigchld"
            )
        else:
            try:
                server, control, features = await launch(loop, self._method, self._preload, stacklevel=stacklevel)
                link = Link(loop, control, server)
            except OSError as exc:
                if exc.errno not in _UNSUPPORTED:
                    raise
                obstacle = exc
            else:
                obstacle = await _handshake(server, link)
        if obstacle is None:
            self._server, self._link, self._features = server, link, features
        elif self._fallback:
            self._features = describe_fallback(obstacle)
        else:
            raise obstacle

    async def _get_link(self, loop: asyncio.AbstractEventLoop) -> Link:
        assert self._link is not None
        if self._restart and self._link.error is not None:
            async with self._lock:
                self._check_usable(loop)
                if self._link.error is not None:
                    await self._link.kill_and_reap_idle()
                    await self._start(loop, stacklevel=7)
        return self._link

    def _check_usable(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._features is None:
            raise RuntimeError("the fork server is not started; use it by async with")
        if self._closed:
            raise RuntimeError("the fork server is closed")
        if loop is not self._loop:
            raise RuntimeError("the fork server belongs to another event loop")

    async def _stop_workers(self, loop: asyncio.AbstractEventLoop, grace: float) -> None:
        registry = registry_of(loop)
        for sig in (signal.SIGTERM, signal.SIGKILL):
            workers = list(self._workers.values())
            for _, child in workers:
                registry.send_signal(child, sig)
            if workers:
                await asyncio.wait([exited for exited, _ in workers], timeout=grace if sig == signal.SIGTERM else None)


def _track_worker(workers: Workers, worker: AbstractChildProcess) -> None:
    """Keep a worker in `workers` until it exits. The callback does not refer to the ForkServer, which may be dropped."""
    observer = worker._exit
    workers[observer] = (observer.future, worker._child)
    observer.future.add_done_callback(lambda _: workers.pop(observer, None), context=Context())


async def _handshake(server: AbstractChildProcess, link: Link) -> OSError | None:
    """Wait until the server has forked a worker. Return None, or an error that shows that fork servers are not available.

    Raises:
        ChildStartError: the server has exited.
        OSError: the server cannot fork now.
    """
    server.detach()

    def on_exit(exited: asyncio.Future[ExitStatus]) -> None:
        link.on_server_exit(ConnectionResetError(errno.ECONNRESET, f"the fork server has exited: {exited.result()!r}"))

    server._exit.future.add_done_callback(on_exit, context=Context())
    failure: OSError | str | None = "cancelled"
    try:
        failure = await _await_handshake(server, link)
    finally:
        if failure is not None:
            await kill_and_reap(server)
            await link.kill_and_reap_idle()
    if failure is None or (isinstance(failure, OSError) and failure.errno in _UNSUPPORTED):
        return failure
    if isinstance(failure, OSError) and failure.errno != errno.ECONNRESET:
        raise failure
    status = server._exit.future.result()
    text = f"\n{failure}" if isinstance(failure, str) else ""
    raise ChildStartError(f"the fork server exited before it was ready: {status!r}{text}", status)


async def _await_handshake(server: AbstractChildProcess, link: Link) -> OSError | str | None:
    """Return None if the server can fork, else an error, or the server's traceback as text."""
    failure = await asyncio.shield(link.handshake)
    if failure == "":
        try:
            made = await asyncio.shield(link.prefork().outcome)
        except OSError as exc:
            return exc
        return made if isinstance(made, OSError) else None
    if isinstance(failure, str):
        await asyncio.shield(server._exit.future)
    return failure


def _check_fds(pass_fds: Iterable[int]) -> tuple[int, ...]:
    fds = tuple(pass_fds)
    for fd in fds:
        if not isinstance(fd, int) or isinstance(fd, bool):
            raise TypeError(f"pass_fds must be ints, not {type(fd).__name__}")
        if fd < 0:
            raise ValueError(f"pass_fds must contain file descriptors >= 0, not {fd}")
    if len(set(fds)) < len(fds):
        raise ValueError("pass_fds contains a file descriptor twice")
    if len(fds) >= MAX_FDS:
        raise ValueError(f"pass_fds must contain at most {MAX_FDS - 1} file descriptors, not {len(fds)}")
    return fds
