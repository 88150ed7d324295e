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

# clone(2) with CLONE_PIDFD and CLONE_PARENT cannot be had here, as against: not at the moment.
_UNSUPPORTED = syscalls.FORBIDDEN | {errno.EINVAL, errno.ENOTSUP}


Workers = dict[object, "tuple[asyncio.Future[ExitStatus], Child]"]
"""Those that have not ended, by what hears of their end: their handles may be dropped."""


class ForkServer:
    """A small process with one thread that forks workers for this one.

    `afork` copies this process, which takes longer the bigger it is, and is not safe beside threads. A fork server copies
    itself. Its workers are children of *this* process all the same: waited for, signalled and measured as any other.

        async with ForkServer() as server:
            async with await server.afork(function, argument) as worker:
                ...

    Start it early: with the start method "fork" it is a copy of what this process is at that moment. While this process has
    one thread, that also makes workers that nobody else can reap. "spawn" makes it a fresh interpreter, which takes longer,
    and is as small and as safe whenever it is started.

    One worker is forked ahead of its order: it is an idle process more, and what comes next need not wait for a fork.
    `pass_fds` does, since descriptors go by way of the server.

    The server keeps no descriptor of this process whose end somebody may wait for: no pipe, socket or terminal, no file that
    is locked at that moment, nothing but plain files. With "fork" their numbers become those of /dev/null. It keeps the
    standard streams and, with "fork", other files and folders, as one that logging writes to. Workers get the rest by
    `pass_fds`.

    The server ends with this object or its loop, at the latest with this process. Workers live on; the server may be killed,
    too.
    """

    _link: Link | None = None  # until the server is started: a constructor that fails has nothing to warn of

    def __init__(
        self,
        *,
        preload: Iterable[str] = (),
        start_method: StartMethod = "fork",
        restart: bool = False,
        fallback: bool = False,
    ) -> None:
        """Start nothing yet.

        Args:
            preload: modules that the server imports, so that no worker has to. "__main__": with "spawn", this program's main
                module, as multiprocessing does; it is then imported under the name of `__mp_main__`.
            start_method: "fork" or "spawn".
            restart: start the server anew, at the next `afork`, if it has ended.
            fallback: where there can be no fork server, make each worker by the plain `afork`.
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
            warnings.warn(f"{self!r} was dropped; close() it, or use async with", ResourceWarning, source=self, stacklevel=2)
            link.drop()

    async def __aenter__(self) -> ForkServer:
        """Start the server.

        With the start method "fork" the loop waits meanwhile for as long as a fork of this process takes.

        Raises:
            ChildStartError: it has ended before it was ready; with the traceback if a module could not be preloaded.
            OSError: ENOSYS, EPERM, EACCES: pidfds, or clone(2) with CLONE_PIDFD, are forbidden here. EINVAL: the server is
                init of a PID namespace. ENOTSUP: see `ap_fork` in clone.h. EAGAIN, ENOMEM, EMFILE, ENFILE: as for fork(2).
        """
        if self._loop is not None:
            raise RuntimeError("a ForkServer can be started once")
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
        """How the server was made. RuntimeError: it was not started."""
        if self._features is None:
            raise RuntimeError("the fork server is not started; use it by async with")
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

        As `aiopidfd.afork`, but for: what is run is pickled, by cloudpickle, if it is installed, where pickle cannot.
        "auto" means ready when it is unpickled, too. Standard streams, environment and working directory are the server's.

        Args:
            ready, start_new_session, process_group: as for `afork`.
            pdeathsig: the signal that the child gets when this process dies: more exactly, when the *thread* that started
                the server ends.
            pass_fds: descriptors that the child gets, with the numbers that they have here.

        Raises:
            pickle.PicklingError: `child_func` or `args` cannot be pickled; nothing was sent.
            TypeError, ValueError: another argument is not what it must be; nothing was sent.
            ChildStartError: the child ended before it was ready, with its traceback if there is one.
            ConnectionResetError: the server has ended. There is no child.
            OSError: EAGAIN, ENOMEM, EMFILE, ENFILE: as for fork(2), here or in the server. ENOTSUP: the server is in another
                PID namespace, and nothing tells what pid the worker has in this one (before Linux 6.13, without a /proc).
            RuntimeError: the server is not started, closed, or belongs to another loop.

        Cancellation kills the half-made child and reaps it before it goes on. If the server does not answer within a second,
        because it was stopped, that is left for when it goes on.
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
        """End the server; calls of `afork` that it has got already are served before. Workers are left alone.

        Args:
            stop_workers: stop them, too: SIGTERM, then SIGKILL after `grace` seconds.
            grace: how long the server, and then the workers, may take.
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
                errno.ENOSYS, "a fork server needs the pidfd backend, and sigchld was chosen"
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
                await asyncio.wait([end for end, _ in workers], timeout=grace if sig == signal.SIGTERM else None)


def _track_worker(workers: Workers, worker: AbstractChildProcess) -> None:
    """Know a worker until it ends. Not by way of the server, which may be dropped before."""
    end = worker._exit
    workers[end] = (end.future, worker._child)
    end.future.add_done_callback(lambda _: workers.pop(end, None), context=Context())


async def _handshake(server: AbstractChildProcess, link: Link) -> OSError | None:
    """Wait until the server has forked a worker; return why it cannot. ChildStartError: it has ended."""
    server.detach()

    def on_exit(end: asyncio.Future[ExitStatus]) -> None:
        link.on_server_exit(ConnectionResetError(errno.ECONNRESET, f"the fork server has ended: {end.result()!r}"))

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
    raise ChildStartError(f"the fork server ended before it was ready: {status!r}{text}", status)


async def _await_handshake(server: AbstractChildProcess, link: Link) -> OSError | str | None:
    """Return why the server cannot fork, as an error or as its own traceback; None if it can."""
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
            raise ValueError(f"pass_fds must be descriptors, and there is {fd} among them")
    if len(set(fds)) < len(fds):
        raise ValueError("pass_fds names a descriptor twice")
    if len(fds) >= MAX_FDS:
        raise ValueError(f"pass_fds can be {MAX_FDS - 1} descriptors at most, and are {len(fds)}")
    return fds
