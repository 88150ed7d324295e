"""Subprocess transports over the registry: the same on every loop."""

from __future__ import annotations

import asyncio
import subprocess
import warnings
from asyncio.subprocess import SubprocessStreamProtocol
from collections.abc import Callable
from contextvars import copy_context
from io import FileIO
from typing import Any

from .._backends.backend import logger
from .._backends.lost_status import warn_lost
from .._backends.orphans import ENDED
from .._kernel.exit_status import ExitStatus
from .._watch.child import Child
from .._watch.loop_link import can_nest
from .._watch.registry import Registry
from .._watch.starting import StartingProgram
from .lifecycle import kill, watch_program
from .pipes import ReadPipeTransport, WritePipeTransport, make_pipe_end


def runs_user_code(protocol: asyncio.BaseProtocol) -> bool:
    """Return whether the protocol, being called, may call a user's code: any but asyncio's own, which completes futures."""
    return type(protocol) is not SubprocessStreamProtocol


class SubprocessTransport(asyncio.SubprocessTransport):
    """One subprocess and the transports of its pipes.

    It differs from asyncio's in this: signals go by pidfd, so never to a recycled pid, and `Process.wait()` ends when
    the process does, whoever still holds its pipes.
    """

    _closed = True  # until the process is watched: a constructor that fails has nothing to close
    _runs_user_code = False  # and no context

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        registry: Registry,
        protocol: asyncio.SubprocessProtocol,
        process: subprocess.Popen[bytes],
        program: StartingProgram,
    ) -> None:
        super().__init__({"subprocess": process})
        self._loop = loop
        self._registry = registry
        self._protocol: asyncio.SubprocessProtocol | None = protocol
        if runs_user_code(protocol):
            self._runs_user_code = True
            registry.contexts[id(self)] = copy_context()
        self._process = process
        self._returncode: int | None = None
        self._exit_notified = False
        self._waiters: set[asyncio.Future[None]] = set()
        self._pipes: dict[int, _PipeProtocol] = {}
        self._child: Child | None = None
        try:
            self._child = watch_program(registry, program, self._process_exited)
        except (ProcessLookupError, ChildProcessError):
            # Somebody else has reaped it between its birth and our pidfd_open.
            if process.returncode is None:
                warn_lost(process.pid)
            loop.call_soon(self._process_exited, ExitStatus(process.pid, 0, "lost"))
        self._closed = False

    def __repr__(self) -> str:
        state = "running" if self._returncode is None else f"returncode={self._returncode}"
        pipes = "".join(f" {('stdin', 'stdout', 'stderr')[fd]}={pipe.transport!r}" for fd, pipe in self._pipes.items())
        return f"<{type(self).__name__}{' closed' if self._closed else ''} pid={self._process.pid} {state}{pipes}>"

    def __del__(self) -> None:
        self._forget_context()
        # The registry holds a transport whose process runs, so this one has ended, or its loop is closed: nothing to kill.
        if not self._closed:
            warnings.warn(f"unclosed transport {self!r}", ResourceWarning, source=self, stacklevel=2)

    def _connect(self) -> None:
        """Connect the pipes, and the protocol after them."""
        process = self._process
        for fd, made in enumerate((process.stdin, process.stdout, process.stderr)):
            if made is None:
                continue
            file: Any = made
            if type(made) is FileIO:  # Popen has made it
                file = make_pipe_end(made)
                setattr(process, ("stdin", "stdout", "stderr")[fd], file)
            pipe = self._pipes[fd] = _PipeProtocol(self, fd)
            if fd == 0:
                pipe.transport = WritePipeTransport(self._loop, file, pipe)
                pipe.transport.watch_peer()
            else:
                pipe.transport = ReadPipeTransport(self._loop, file, pipe)
                pipe.transport.resume_reading()  # from the next round on: the protocol may pause it now
        assert self._protocol is not None
        self._call(self._protocol.connection_made, self)

    def _call(self, callback: Callable[..., object], *args: Any) -> None:
        """Call a method that calls the protocol, in the context of whoever has started the process.

        Not by way of call_soon, so that a reader is paused before more is read. What the protocol raises must reach
        neither the pipe's transport nor the registry. Each call has a copy of the context, as on asyncio's loops: a context
        cannot be entered twice, and the protocol may call us, or run the loop.
        """
        context = self._registry.contexts.get(id(self)) if self._runs_user_code else None
        try:
            if context is None:  # nobody's code is called, or all is over
                callback(*args)
            else:
                context.copy().run(callback, *args)
        except (Exception, asyncio.CancelledError) as exc:
            message = f"Exception in the protocol of process {self._process.pid}"
            self._loop.call_exception_handler({"message": message, "exception": exc, "transport": self})

    def _process_exited(self, status: ExitStatus) -> None:
        # If it was Popen.poll() or wait() that took the status, Popen knows it.
        if status.source == "lost" and self._process.returncode is not None:
            self._returncode = self._process.returncode
        else:
            self._returncode = self._process.returncode = status.returncode
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        if self._protocol is not None:
            if self._runs_user_code:
                self._registry.link.renew()
            self._call(self._notify_exit)

    def _notify_exit(self) -> None:
        assert self._protocol is not None
        self._exit_notified = True
        try:
            self._protocol.process_exited()
        finally:
            self._try_finish()

    def _notify_data(self, fd: int, data: bytes) -> None:
        assert self._protocol is not None
        self._protocol.pipe_data_received(fd, data)

    def _notify_pipe_lost(self, fd: int, exc: Exception | None) -> None:
        try:
            if self._protocol is not None:
                self._protocol.pipe_connection_lost(fd, exc)
        finally:
            self._pipes[fd].lost = True
            self._try_finish()

    def _try_finish(self) -> None:
        """Tell the protocol of the end once it knows that the process has exited and that the pipes are closed."""
        if self._exit_notified and self._protocol is not None and all(p.lost for p in self._pipes.values()):
            protocol, self._protocol = self._protocol, None
            self._closed = True
            self._call(protocol.connection_lost, None)
            self._forget_context()

    def _forget_context(self) -> None:
        if self._runs_user_code:
            self._registry.contexts.pop(id(self), None)

    def _can_nest(self) -> bool:
        """Return whether the protocol, being called, may run the loop."""
        return self._runs_user_code and can_nest(self._loop)

    async def _wait(self) -> int:
        """Wait until the process has exited; asyncio.subprocess.Process.wait() calls it."""
        if self._returncode is None:
            waiter = self._loop.create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
        assert self._returncode is not None
        return self._returncode

    async def _wait_uncancellable(self) -> None:
        """Wait until the process has exited, however often that is cancelled: it has been killed."""
        while self._returncode is None:
            try:
                await self._wait()
            except asyncio.CancelledError:
                continue

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Set the protocol that is told from now on."""
        if self._protocol is not None and not self._runs_user_code and runs_user_code(protocol):
            self._runs_user_code = True
            self._registry.contexts[id(self)] = copy_context()
        self._protocol = protocol  # type: ignore[assignment] # the stub is wider than what a subprocess can have

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol; None, as asyncio's transports do, once it has been told of the end."""
        return self._protocol  # type: ignore[return-value] # asyncio's stub does not know of None

    def get_pid(self) -> int:
        """Return the process ID."""
        return self._process.pid

    def get_returncode(self) -> int | None:
        """Return the exit code, or -signum; None while the process runs."""
        return self._returncode

    def get_pipe_transport(self, fd: int) -> asyncio.BaseTransport | None:
        """Return the transport of the process's stdin (0), stdout (1) or stderr (2), if that is a pipe of ours."""
        pipe = self._pipes.get(fd)
        return None if pipe is None else pipe.transport

    def send_signal(self, signal: int) -> None:
        """Send the signal to the process and to no other. Logged, and not sent, if it has ended.

        Raises:
            ProcessLookupError: it has ended, and the protocol was told of it.
            OSError: EINVAL, no such signal; EPERM, it runs as another user.
        """
        if self._protocol is None:
            raise ProcessLookupError(f"process {self._process.pid} has ended")
        obstacle = ENDED if self._child is None else self._registry.send_signal(self._child, signal)
        if obstacle is not None:
            logger.warning("signal %d not sent: process %d %s", signal, self._process.pid, obstacle)

    def terminate(self) -> None:
        """Send SIGTERM; see `send_signal`."""
        self.send_signal(15)

    def kill(self) -> None:
        """Send SIGKILL; see `send_signal`."""
        self.send_signal(9)

    def is_closing(self) -> bool:
        """Return whether `close` was called, or all is over."""
        return self._closed

    def close(self) -> None:
        """Close the pipes and kill the process, as asyncio's transports do; it is reaped all the same."""
        if not self._closed:
            self._kill_and_close()

    def _discard(self) -> None:
        """Kill the process and close its pipes: its caller gets an error instead."""
        self._closed = True
        if self._child is not None and self._returncode is None:
            kill(self._registry, self._child)
        for pipe in self._pipes.values():
            if pipe.transport is not None:
                pipe.transport.abort()

    def _kill_and_close(self) -> bool:
        """Do what `close` does; return False if the process may not be killed, so that its end may be far."""
        self._closed = True
        killed = True
        if self._child is not None and self._returncode is None:
            try:  # before its pipes are closed, which it might take for a reason to end by itself
                obstacle = self._registry.send_signal(self._child, 9)
            except PermissionError:  # it runs as another user now
                obstacle = "runs as another user"
            except OSError as exc:  # its loop is closed, and there is no descriptor left
                obstacle = f"cannot be reached: {exc.strerror}"
            if obstacle not in (None, ENDED):
                logger.warning("cannot kill process %d: it %s", self._process.pid, obstacle)
                killed = False
        for pipe in self._pipes.values():
            if pipe.transport is not None:
                pipe.transport.close()
        return killed


class _PipeProtocol:
    """Pass the events of one pipe on to the transport of its process."""

    def __init__(self, owner: SubprocessTransport, fd: int) -> None:
        self.transport: Any = None
        self.lost = False
        self._owner = owner
        self._fd = fd

    def data_received(self, data: bytes) -> None:
        if self._owner._can_nest():
            self.transport.renew()
        self._owner._call(self._owner._notify_data, self._fd, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner._call(self._owner._notify_pipe_lost, self._fd, exc)

    def pause_writing(self) -> None:
        if self._owner._protocol is not None:
            self._owner._call(self._owner._protocol.pause_writing)

    def resume_writing(self) -> None:
        if self._owner._protocol is not None:
            if self._owner._can_nest():
                self.transport.renew()
            self._owner._call(self._owner._protocol.resume_writing)
