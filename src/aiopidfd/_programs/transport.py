"""The subprocess transport. It is the same on every loop: the registry reports the exit."""

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
    """Return whether a method of the protocol may run code of the user. asyncio's own protocol only completes futures."""
    return type(protocol) is not SubprocessStreamProtocol


class SubprocessTransport(asyncio.SubprocessTransport):
    """One subprocess and the transports of its pipes.

    Two things differ from asyncio's transport. Signals are sent by pidfd, so never to a recycled pid. `Process.wait()`
    returns when the process has exited, even if another process still holds its pipes.
    """

    # __del__ may run after a failed __init__.
    _closed = True
    _runs_user_code = False

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
            # Another waitpid() reaped it between its start and our pidfd_open().
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
        # The registry refers to the transport of a running process. So the process has exited, or the loop is closed.
        if not self._closed:
            warnings.warn(f"unclosed transport {self!r}", ResourceWarning, source=self, stacklevel=2)

    def _connect(self) -> None:
        """Connect the pipes. Then call `connection_made`."""
        process = self._process
        for fd, made in enumerate((process.stdin, process.stdout, process.stderr)):
            if made is None:
                continue
            file: Any = made
            if type(made) is FileIO:  # from subprocess.Popen
                file = make_pipe_end(made)
                setattr(process, ("stdin", "stdout", "stderr")[fd], file)
            pipe = self._pipes[fd] = _PipeProtocol(self, fd)
            if fd == 0:
                pipe.transport = WritePipeTransport(self._loop, file, pipe)
                pipe.transport.watch_peer()
            else:
                pipe.transport = ReadPipeTransport(self._loop, file, pipe)
                pipe.transport.resume_reading()  # data arrives later: connection_made() may pause it first
        assert self._protocol is not None
        self._call(self._protocol.connection_made, self)

    def _call(self, callback: Callable[..., object], *args: Any) -> None:
        """Call a method that calls the protocol, in the context of the code that started the process.

        The call is direct, without call_soon(): a protocol that pauses a reader gets no more data. An exception of the
        protocol goes to the loop's exception handler, not to the pipe's transport or the registry. Each call has a copy of
        the context, as on asyncio's loops: a context cannot be entered twice, and the protocol may call us, or run the loop.
        """
        context = self._registry.contexts.get(id(self)) if self._runs_user_code else None
        try:
            if context is None:  # no code of the user runs, or connection_lost() was called
                callback(*args)
            else:
                context.copy().run(callback, *args)
        except (Exception, asyncio.CancelledError) as exc:
            message = f"Exception in the protocol of process {self._process.pid}"
            self._loop.call_exception_handler({"message": message, "exception": exc, "transport": self})

    def _process_exited(self, status: ExitStatus) -> None:
        # If Popen.poll() or Popen.wait() reaped the process, Popen has the returncode.
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
        """Call `connection_lost` once `process_exited` was called and all pipes are closed."""
        if self._exit_notified and self._protocol is not None and all(p.lost for p in self._pipes.values()):
            protocol, self._protocol = self._protocol, None
            self._closed = True
            self._call(protocol.connection_lost, None)
            self._forget_context()

    def _forget_context(self) -> None:
        if self._runs_user_code:
            self._registry.contexts.pop(id(self), None)

    def _can_nest(self) -> bool:
        """Return whether a method of the protocol may run the loop again."""
        return self._runs_user_code and can_nest(self._loop)

    async def _wait(self) -> int:
        """Wait until the process has exited. asyncio.subprocess.Process.wait() calls this."""
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
        """Wait until the process has exited, and ignore cancellation: the process was killed, so the wait is short."""
        while self._returncode is None:
            try:
                await self._wait()
            except asyncio.CancelledError:
                continue

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Set the protocol whose methods are called from now on."""
        if self._protocol is not None and not self._runs_user_code and runs_user_code(protocol):
            self._runs_user_code = True
            self._registry.contexts[id(self)] = copy_context()
        self._protocol = protocol  # type: ignore[assignment] # the stub is wider than what a subprocess can have

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol. As with asyncio's transports, it is None once `connection_lost` was called."""
        return self._protocol  # type: ignore[return-value] # asyncio's stub does not know of None

    def get_pid(self) -> int:
        """Return the process ID."""
        return self._process.pid

    def get_returncode(self) -> int | None:
        """Return the exit code, or -signum, or None while the process runs."""
        return self._returncode

    def get_pipe_transport(self, fd: int) -> asyncio.BaseTransport | None:
        """Return the transport of the process's stdin (0), stdout (1) or stderr (2), or None if it is not a pipe."""
        pipe = self._pipes.get(fd)
        return None if pipe is None else pipe.transport

    def send_signal(self, signal: int) -> None:
        """Send the signal to the process and to no other. If the process has ended, log a warning and send nothing.

        Raises:
            ProcessLookupError: the process has ended, and `connection_lost` was called.
            OSError: EINVAL, no such signal; EPERM, the process runs as another user.
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
        """Return whether `close` was called, or `connection_lost`."""
        return self._closed

    def close(self) -> None:
        """Kill the process and close its pipes, as asyncio's transports do. The process is reaped in any case."""
        if not self._closed:
            self._kill_and_close()

    def _discard(self) -> None:
        """Kill the process and drop its pipes: the caller gets an error instead of a transport."""
        self._closed = True
        if self._child is not None and self._returncode is None:
            kill(self._registry, self._child)
        for pipe in self._pipes.values():
            if pipe.transport is not None:
                pipe.transport.abort()

    def _kill_and_close(self) -> bool:
        """Do what `close` does. Return False if the process cannot be killed: it may run for long."""
        self._closed = True
        killed = True
        if self._child is not None and self._returncode is None:
            try:  # first: a program may exit by itself when its pipes are closed
                obstacle = self._registry.send_signal(self._child, 9)
            except PermissionError:  # it runs as another user now
                obstacle = "runs as another user"
            except OSError as exc:  # EMFILE, ENFILE: the loop is closed, and there is no descriptor for a new pidfd
                obstacle = f"cannot be reached: {exc.strerror}"
            if obstacle not in (None, ENDED):
                logger.warning("cannot kill process %d: it %s", self._process.pid, obstacle)
                killed = False
        for pipe in self._pipes.values():
            if pipe.transport is not None:
                pipe.transport.close()
        return killed


class _PipeProtocol:
    """Pass the events of one pipe to the transport of its process."""

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
