"""One worker to be: how its parent makes it, by a fork server, watches it, and lets it go or ends it."""

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

# How long a cancelled request waits for the server's word on whether there is a worker to be ended.
REPLY_TIMEOUT_S = 1.0

_READ_SIZE = 65536
_CREDENTIALS = struct.Struct("3i")  # of the kernel: pid in our namespace, uid, gid

Outcome = Union[AbstractChildProcess, OSError]
"""A watched worker, or why there is none."""

OnStart = Callable[[AbstractChildProcess], object]
"""Called with each worker as soon as it is watched."""


class Request:
    """One worker to be: the parent's end of its gate, and what is known of it.

    It may be sent before anybody has ordered what the worker is to run: until then the worker stands at its gate.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, pass_fds: Sequence[int] = ()) -> None:
        """Send nothing yet."""
        self._loop = loop
        self._pass_fds = pass_fds
        self._options: Options | None = None  # until it is ordered
        self._on_start: OnStart = _ignore
        self._unwritten: deque[memoryview] = deque()
        self._is_writer = False
        self._gate: socket.socket | None = None
        self._received = bytearray()
        self._pid = 0
        self._server_error: OSError | None = None
        self._is_cancelled = False
        self._kill_switch: KillSwitch | None = None  # while nobody has ordered anything of the worker
        self.failure = ""  # the traceback, if the worker has told one
        self.outcome: asyncio.Future[Outcome] = loop.create_future()
        self.ready: asyncio.Future[bool] = loop.create_future()  # True, or False if it never will be

    def assign(self, body: bytes, options: Options, on_start: OnStart) -> None:
        """Have the worker run what is pickled in `body`."""
        self._options = options
        self._on_start = on_start
        head = pack_task(options, self._pass_fds, len(body))
        # Small ones are sent as a whole, so that the worker can read them so; big ones are not copied.
        self._unwritten.extend(memoryview(part) for part in ([head + body] if len(body) < 4000 else [head, body]))
        if self.outcome.done():
            self._release(self.outcome.result(), options)
        self._close_kill_switch()
        self._write()

    @property
    def is_unusable(self) -> bool:
        """Whether a worker without an order has ended or will, or there is none and none to come."""
        if self._is_cancelled:
            return True
        if not self.outcome.done():
            return False
        if self.ready.done():  # it has closed its gate: killed, though its end was not told yet
            return True
        worker = self.outcome.result()
        return not isinstance(worker, AbstractChildProcess) or worker.returncode is not None

    def send(self, control: socket.socket, number: int) -> None:
        """Send it. OSError: EMFILE, ENFILE, EBADF among them; nothing was sent."""
        gate, worker_gate = socket.socketpair()
        gate.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        afork.register_parent_socket(gate)
        with worker_gate:
            try:
                socket.send_fds(control, [REQUEST.pack(number)], [worker_gate.fileno(), *self._pass_fds])
            except BaseException:
                afork.unregister_parent_socket(gate)
                gate.close()
                raise
        gate.setblocking(False)
        self._gate = gate
        add_reader(self._loop, gate.fileno(), self.on_readable)
        self._write()

    def _write(self) -> None:
        """Write what goes into the gate until it is full, and the rest later."""
        if self._gate is None:
            return
        full = False
        try:
            while self._unwritten and not full:
                sent = self._gate.send(self._unwritten[0])
                full = sent < len(self._unwritten[0])
                self._unwritten[0] = self._unwritten[0][sent:]
                if not full:
                    self._unwritten.popleft()
        except (BlockingIOError, InterruptedError):
            full = True
        except ConnectionError:  # it has ended, or the server has and there is no worker: that is told elsewhere
            self._unwritten.clear()
        if full and not self._is_writer:
            add_writer(self._loop, self._gate.fileno(), self._write)
        elif self._is_writer and not full:
            self._loop.remove_writer(self._gate.fileno())
        self._is_writer = full

    def on_readable(self) -> None:
        """Hear what the worker says."""
        if self._gate is None:
            return
        try:
            while True:
                data, ancillary, _, _ = self._gate.recvmsg(_READ_SIZE, socket.CMSG_SPACE(_CREDENTIALS.size))
                if not data:
                    break
                for level, kind, credentials in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                        self._pid = _CREDENTIALS.unpack(credentials)[0]
                self._received += data
        except (BlockingIOError, InterruptedError):
            self._parse()
        except ConnectionError:  # ended with our words unread
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
        assert self._gate is not None
        self._loop.remove_reader(self._gate.fileno())
        self._parse()
        self._set_ready(False)
        if self._server_error is not None and not self._pid:
            self.set_outcome(self._server_error)

    def on_reply(self, pid: int, pidfd: int, code: int) -> None:
        """Watch the worker from now on, and let it out of its gate if it knows what to run.

        `pid` is 0 where the server is in another PID namespace. `pidfd`, or -1, is ours from now on.
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
            worker.detach()  # until somebody else has its handle
            if self._is_cancelled:
                afork.kill(worker)
            elif self._options is None:
                self._kill_switch = KillSwitch(worker)
        if self._options is not None:
            self._release(worker, self._options)
            self._write()

    def _kill_unknown(self, pidfd: int) -> None:
        """End a worker whose pid is not known, and so would be somebody else's. Without a pidfd it says itself who it is."""
        if pidfd < 0:
            self.on_server_exit(syscalls.error(errno.EMFILE, "the pidfd of a worker in another PID namespace was lost"))
            if self._options is None:
                self.cancel()
            return
        syscalls.send_signal(pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # somebody else has reaped it
            syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        self.set_outcome(
            OSError(
                errno.ENOTSUP,
                "the fork server is in another PID namespace, and what pid a worker has in this one cannot be learnt: "
                "it takes Linux 6.13, or a /proc of this namespace",
            )
        )

    def _release(self, worker: Outcome, options: Options) -> None:
        if isinstance(worker, AbstractChildProcess) and not self._is_cancelled:
            worker._attach(options.pgid)
            self._on_start(worker)
            self._unwritten.append(memoryview(RELEASE))

    def on_server_exit(self, reason: OSError) -> None:
        """Hear that the server has ended without a reply. If there is a worker all the same, it says so by its gate."""
        self._server_error = reason
        if self._gate is None:
            self.set_outcome(reason)
        elif self._pid:
            self.on_reply(self._pid, -1, 0)
        elif self.ready.done():  # there will be nothing more to hear
            self.set_outcome(reason)

    def set_outcome(self, outcome: Outcome) -> None:
        """Be done with the making of the worker."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    async def wait(self) -> AbstractChildProcess:
        """Wait until the worker is ready, and return its handle. Raises ChildStartError, OSError: there is none."""
        worker = await asyncio.shield(self.outcome)
        if not isinstance(worker, AbstractChildProcess):
            raise OSError(worker.errno, worker.strerror)  # a new one: many requests may share the server's end
        await afork.wait_until_ready(worker, self.ready, f"worker process {worker.pid}", self._explain)
        return worker

    def _explain(self) -> str:
        self.on_readable()  # it has ended, and its last message may be unread
        return f"\n{self.failure}" if self.failure else ""

    def cancel(self) -> None:
        """Have the worker end, as soon as it is known that there is one."""
        self._is_cancelled = True
        if self.outcome.done():
            worker = self.outcome.result()
            if isinstance(worker, AbstractChildProcess):
                worker.detach()
                afork.kill(worker)
        elif self._gate is None:
            self.set_outcome(OSError(errno.ECANCELED, "cancelled"))
        elif self._options is None:
            with contextlib.suppress(OSError):  # ENOTCONN: it has ended
                self._gate.shutdown(socket.SHUT_WR)  # a worker that nobody knows of says so before it ends

    async def kill_and_reap(self) -> None:
        """End the worker, and reap it, however often we are cancelled meanwhile."""
        self.cancel()
        deadline = self._loop.time() + REPLY_TIMEOUT_S
        while not self.outcome.done() and self._loop.time() < deadline:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([self.outcome], timeout=deadline - self._loop.time())
        if self.outcome.done():
            worker = self.outcome.result()
            if isinstance(worker, AbstractChildProcess):
                await afork.kill_and_reap(worker)
        # else the server is stopped, or starved. If it ever goes on, `bind` ends the worker, and the registry reaps it.

    def close(self) -> None:
        """Close the gate, now or when the outcome is known."""
        if self.outcome.done():
            self._close()
        else:
            self.outcome.add_done_callback(lambda _: self._close())

    def _close(self) -> None:
        self._close_kill_switch()
        self._close_gate(is_loop_closed=False)

    def _close_gate(self, *, is_loop_closed: bool) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            if not is_loop_closed:
                self._loop.remove_reader(gate.fileno())
                if self._is_writer:
                    self._loop.remove_writer(gate.fileno())
            afork.unregister_parent_socket(gate)
            gate.close()

    def _close_kill_switch(self) -> None:
        if self._kill_switch is not None:
            self._kill_switch.close()
            self._kill_switch = None

    def kill_now(self, *, is_loop_closed: bool) -> None:
        """Kill a worker without an order, and return when it is a zombie; another one loses its gate.

        `is_loop_closed`: the loop is closed, or gone.
        """
        self._close_gate(is_loop_closed=is_loop_closed)
        if self._kill_switch is not None:
            self._kill_switch.kill()


def _ignore(worker: AbstractChildProcess) -> None:
    """Be told of a worker that nobody has ordered."""


def _watch_worker(loop: asyncio.AbstractEventLoop, pid: int, pidfd: int, code: int) -> Outcome:
    """Return the handle of a worker that stands at its gate, or why there is none."""
    if code:
        return syscalls.error(code, "the fork server cannot make a worker: clone(CLONE_PIDFD | CLONE_PARENT)")
    try:
        return watch_forked(pid, pgid=None, pidfd=pidfd, loop=loop, check=pidfd < 0)
    except (ProcessLookupError, ChildProcessError) as exc:  # killed and reaped while we knew no more than its pid
        return exc
    except OSError as exc:
        afork.kill_and_reap_unwatched(pid, pidfd)
        return exc
