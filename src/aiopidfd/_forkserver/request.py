"""One request for a worker: have a fork server fork it, watch it, give it a task, release it, or kill it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Union

from .._fork import afork
from .._fork.child import Options
from .._fork.handle import AbstractChildProcess, watch_forked
from .._kernel import syscalls
from .._watch.loop_link import add_reader, add_writer
from .._watch.start_gate import READY, RELEASE
from .kill_switch import KillSwitch
from .process import FAILED, FAILURE, REQUEST, STARTED, pack_task

# How long a cancelled request waits for the server's reply, which shows whether there is a worker to kill.
REPLY_TIMEOUT_S = 1.0

_READ_SIZE = 65536
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid in this PID namespace, uid, gid

Outcome = Union[AbstractChildProcess, OSError]
"""A watched worker, or the error."""

OnStart = Callable[[AbstractChildProcess], object]
"""Called with each worker as soon as it is watched."""


class Request:
    """A request for one worker, with the parent's end of the worker's socket, which is its start gate.

    A request may be sent before it has a task. Then the worker is idle: it waits for the task.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, pass_fds: Sequence[int] = ()) -> None:
        """Send nothing."""
        self._loop = loop
        self._pass_fds = pass_fds
        self._options: Options | None = None  # None: there is no task yet
        self._on_start: OnStart = _ignore
        self._unwritten: deque[memoryview] = deque()
        self._is_writer = False
        self._socket: socket.socket | None = None
        self._received = bytearray()
        self._pid = 0
        self._server_error: OSError | None = None
        self._is_cancelled = False
        self._kill_switch: KillSwitch | None = None  # while the worker is idle
        self.failure = ""  # the worker's traceback, if it has sent one
        self.outcome: asyncio.Future[Outcome] = loop.create_future()
        self.ready: asyncio.Future[bool] = loop.create_future()  # False: the worker cannot become ready

    def assign(self, body: bytes, options: Options, on_start: OnStart) -> None:
        """Have the worker run the task that is pickled in `body`."""
        self._options = options
        self._on_start = on_start
        head = pack_task(options, self._pass_fds, len(body))
        # A small task is sent in one message, so that the worker reads it by one call. A big one is not copied.
        self._unwritten.extend(memoryview(part) for part in ([head + body] if len(body) < 4000 else [head, body]))
        if self.outcome.done():
            self._release(self.outcome.result(), options)
        self._close_kill_switch()
        self._write()

    @property
    def is_unusable(self) -> bool:
        """Whether the idle worker has exited or is about to, or there is none."""
        if self._is_cancelled:
            return True
        if not self.outcome.done():
            return False
        if self.ready.done():  # the worker has closed its socket: it was killed, and its exit is not reported yet
            return True
        worker = self.outcome.result()
        return not isinstance(worker, AbstractChildProcess) or worker.returncode is not None

    def send(self, control: socket.socket, number: int) -> None:
        """Send the request to the server.

        Raises:
            OSError: EMFILE, ENFILE: too many open files. EBADF: a descriptor in pass_fds is not open. Others:
                see sendmsg(2). Nothing was sent.
        """
        sock, worker_end = socket.socketpair()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        afork.register_parent_socket(sock)
        with worker_end:
            try:
                socket.send_fds(control, [REQUEST.pack(number)], [worker_end.fileno(), *self._pass_fds])
            except BaseException:
                afork.unregister_parent_socket(sock)
                sock.close()
                raise
        sock.setblocking(False)
        self._socket = sock
        add_reader(self._loop, sock.fileno(), self.on_readable)
        self._write()

    def _write(self) -> None:
        """Write to the worker until the buffer is full, and the rest when there is room."""
        if self._socket is None:
            return
        full = False
        try:
            while self._unwritten and not full:
                sent = self._socket.send(self._unwritten[0])
                full = sent < len(self._unwritten[0])
                self._unwritten[0] = self._unwritten[0][sent:]
                if not full:
                    self._unwritten.popleft()
        except (BlockingIOError, InterruptedError):
            full = True
        except ConnectionError:  # the worker or the server has exited, which is reported in another way
            self._unwritten.clear()
        if full and not self._is_writer:
            add_writer(self._loop, self._socket.fileno(), self._write)
        elif self._is_writer and not full:
            self._loop.remove_writer(self._socket.fileno())
        self._is_writer = full

    def on_readable(self) -> None:
        """Read the worker's messages."""
        if self._socket is None:
            return
        try:
            while True:
                data, ancillary, _, _ = self._socket.recvmsg(_READ_SIZE, socket.CMSG_SPACE(_CREDENTIALS.size))
                if not data:
                    break
                for level, kind, credentials in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                        self._pid = _CREDENTIALS.unpack(credentials)[0]
                self._received += data
        except (BlockingIOError, InterruptedError):
            self._parse()
        except ConnectionError:  # the worker has exited before it read all messages
            self._on_eof()
        else:
            self._on_eof()

    def _parse(self) -> None:
        data = self._received
        if data[:1] == STARTED:
            del data[:1]
            if self._options is not None and self._options.ready == "auto":
                self._set_ready(True)
        if data[:1] == READY:
            self._set_ready(True)
        elif data[:1] == FAILED and len(data) > FAILURE.size:
            (size,) = FAILURE.unpack(data[1 : 1 + FAILURE.size])
            text = data[1 + FAILURE.size :]
            if len(text) == size:
                self.failure = text.decode(errors="replace")
                self._set_ready(False)
        if self._pid and self._server_error is not None:
            self.on_reply(self._pid, -1, 0)

    def _set_ready(self, ready: bool) -> None:
        if not self.ready.done():
            self.ready.set_result(ready)

    def _on_eof(self) -> None:
        assert self._socket is not None
        self._loop.remove_reader(self._socket.fileno())
        self._parse()
        self._set_ready(False)
        if self._server_error is not None and not self._pid:
            self.set_outcome(self._server_error)

    def on_reply(self, pid: int, pidfd: int, code: int) -> None:
        """Watch the worker, and release it if it has a task.

        `pid` is 0 if the server is in another PID namespace. `pidfd` may be -1, and is owned by this object.
        """
        if self.outcome.done():
            return
        if not pid and not code:
            pid = (syscalls.get_pid(pidfd) or 0) if pidfd >= 0 else 0
            if not pid:
                self._kill_unknown(pidfd)
                return
        worker = _watch_worker(self._loop, pid, pidfd, code)
        self.set_outcome(worker)
        if isinstance(worker, AbstractChildProcess):
            worker.detach()  # until the caller has the handle
            if self._is_cancelled:
                afork.kill(worker)
            elif self._options is None:
                self._kill_switch = KillSwitch(worker)
        if self._options is not None:
            self._release(worker, self._options)
            self._write()

    def _kill_unknown(self, pidfd: int) -> None:
        """Kill and reap a worker whose pid is unknown. Without a pidfd, wait for the worker's message, which has its pid."""
        if pidfd < 0:
            self.on_server_exit(syscalls.error(errno.EMFILE, "the pidfd of a worker in another PID namespace was lost"))
            if self._options is None:
                self.cancel()
            return
        syscalls.send_signal(pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # other code has reaped it
            syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        self.set_outcome(
            OSError(
                errno.ENOTSUP,
                "the fork server is in another PID namespace, and the pid of a worker in this one is unknown "
                "(this requires Linux 6.13 or the /proc of this namespace)",
            )
        )

    def _release(self, worker: Outcome, options: Options) -> None:
        if isinstance(worker, AbstractChildProcess) and not self._is_cancelled:
            worker._attach(options.pgid)
            self._on_start(worker)
            self._unwritten.append(memoryview(RELEASE))

    def on_server_exit(self, reason: OSError) -> None:
        """Note that the server has exited without a reply. If there is a worker, its message shows its pid."""
        self._server_error = reason
        if self._socket is None:
            self.set_outcome(reason)
        elif self._pid:
            self.on_reply(self._pid, -1, 0)
        elif self.ready.done():  # there are no more messages
            self.set_outcome(reason)

    def set_outcome(self, outcome: Outcome) -> None:
        """Set the outcome, if it is not set."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    async def wait(self) -> AbstractChildProcess:
        """Wait until the worker is ready, and return its handle.

        Raises:
            ChildStartError: the worker exited before it was ready.
            OSError: there is no worker.
        """
        worker = await asyncio.shield(self.outcome)
        if not isinstance(worker, AbstractChildProcess):
            raise OSError(worker.errno, worker.strerror)  # a copy: many requests may have the same error
        await afork.wait_until_ready(worker, self.ready, f"worker process {worker.pid}", self._explain)
        return worker

    def _explain(self) -> str:
        self.on_readable()  # the worker has exited, and its last message may be unread
        return f"\n{self.failure}" if self.failure else ""

    def cancel(self) -> None:
        """Kill the worker now, or when the server replies."""
        self._is_cancelled = True
        if self.outcome.done():
            worker = self.outcome.result()
            if isinstance(worker, AbstractChildProcess):
                worker.detach()
                afork.kill(worker)
        elif self._socket is None:
            self.set_outcome(OSError(errno.ECANCELED, "cancelled"))
        elif self._options is None:
            with contextlib.suppress(OSError):  # ENOTCONN: the worker has exited
                self._socket.shutdown(socket.SHUT_WR)  # the worker sends STARTED, which shows its pid, and exits

    async def kill_and_reap(self) -> None:
        """Kill the worker, and reap it. Cancellation does not stop this."""
        self.cancel()
        deadline = self._loop.time() + REPLY_TIMEOUT_S
        while not self.outcome.done() and self._loop.time() < deadline:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([self.outcome], timeout=deadline - self._loop.time())
        if self.outcome.done():
            worker = self.outcome.result()
            if isinstance(worker, AbstractChildProcess):
                await afork.kill_and_reap(worker)
        # Without an outcome the server is stopped or very slow. When it replies, on_reply() kills the worker.

    def close(self) -> None:
        """Close the socket now, or when the outcome is set."""
        if self.outcome.done():
            self._close()
        else:
            self.outcome.add_done_callback(lambda _: self._close())

    def _close(self) -> None:
        self._close_kill_switch()
        self._close_socket(is_loop_closed=False)

    def _close_socket(self, *, is_loop_closed: bool) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            if not is_loop_closed:
                self._loop.remove_reader(sock.fileno())
                if self._is_writer:
                    self._loop.remove_writer(sock.fileno())
            afork.unregister_parent_socket(sock)
            sock.close()

    def _close_kill_switch(self) -> None:
        if self._kill_switch is not None:
            self._kill_switch.close()
            self._kill_switch = None

    def kill_now(self, *, is_loop_closed: bool) -> None:
        """Close the socket. Kill the worker if it is idle, and return when it is a zombie.

        `is_loop_closed`: the loop is closed or collected.
        """
        self._close_socket(is_loop_closed=is_loop_closed)
        if self._kill_switch is not None:
            self._kill_switch.kill()


def _ignore(worker: AbstractChildProcess) -> None:
    """Do nothing for an idle worker."""


def _watch_worker(loop: asyncio.AbstractEventLoop, pid: int, pidfd: int, code: int) -> Outcome:
    """Return the handle of a worker that waits for RELEASE, or the error."""
    if code:
        return syscalls.error(code, "the fork server cannot fork a worker: clone(CLONE_PIDFD | CLONE_PARENT)")
    try:
        return watch_forked(pid, pgid=None, pidfd=pidfd, loop=loop, check=pidfd < 0)
    except (ProcessLookupError, ChildProcessError) as exc:  # killed, and reaped by other code, before it was watched
        return exc
    except OSError as exc:
        afork.kill_and_reap_unwatched(pid, pidfd)
        return exc
