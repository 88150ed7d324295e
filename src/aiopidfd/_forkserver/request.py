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
from .._watch.start_gate import READY
from .end import LastResort
from .process import FAILED, FAILURE, GO, REQUEST, STARTED, pack_order

# How long a cancelled request waits for the server's word on whether there is a worker to be ended.
REPLY_S = 1.0

_READ_SIZE = 65536
_CREDENTIALS = struct.Struct("3i")  # of the kernel: pid in our namespace, uid, gid

Outcome = Union[AbstractChildProcess, OSError]
"""A watched worker, or why there is none."""

OnBirth = Callable[[AbstractChildProcess], object]
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
        self._on_birth: OnBirth = _nobody
        self._unwritten: deque[memoryview] = deque()
        self._is_writer = False
        self._gate: socket.socket | None = None
        self._heard = bytearray()
        self._pid = 0
        self._lost: OSError | None = None
        self._abandoned = False
        self._last_resort: LastResort | None = None  # while nobody has ordered anything of the worker
        self.failure = ""  # the traceback, if the worker has told one
        self.outcome: asyncio.Future[Outcome] = loop.create_future()
        self.ready: asyncio.Future[bool] = loop.create_future()  # True, or False if it never will be

    def order(self, body: bytes, options: Options, on_birth: OnBirth) -> None:
        """Have the worker run what is pickled in `body`."""
        self._options = options
        self._on_birth = on_birth
        head = pack_order(options, self._pass_fds, len(body))
        # Small ones are sent as a whole, so that the worker can read them so; big ones are not copied.
        self._unwritten.extend(memoryview(part) for part in ([head + body] if len(body) < 4000 else [head, body]))
        if self.outcome.done():
            self._let_out(self.outcome.result(), options)
        self._give_up_last_resort()
        self._write()

    @property
    def is_spoiled(self) -> bool:
        """Whether a worker without an order has ended or will, or there is none and none to come."""
        if self._abandoned:
            return True
        if not self.outcome.done():
            return False
        if self.ready.done():  # it has closed its gate: killed, though its end was not told yet
            return True
        worker = self.outcome.result()
        return not isinstance(worker, AbstractChildProcess) or worker.returncode is not None

    def send(self, wire: socket.socket, number: int) -> None:
        """Send it. OSError: EMFILE, ENFILE, EBADF among them; nothing was sent."""
        gate, worker_gate = socket.socketpair()
        gate.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        afork.register_parent_socket(gate)
        with worker_gate:
            try:
                socket.send_fds(wire, [REQUEST.pack(number)], [worker_gate.fileno(), *self._pass_fds])
            except BaseException:
                afork.unregister_parent_socket(gate)
                gate.close()
                raise
        gate.setblocking(False)
        self._gate = gate
        add_reader(self._loop, gate.fileno(), self.read)
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

    def read(self) -> None:
        """Hear what the worker says."""
        if self._gate is None:
            return
        try:
            while True:
                heard, control, _, _ = self._gate.recvmsg(_READ_SIZE, socket.CMSG_SPACE(_CREDENTIALS.size))
                if not heard:
                    break
                for level, kind, data in control:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                        self._pid = _CREDENTIALS.unpack(data)[0]
                self._heard += heard
        except (BlockingIOError, InterruptedError):
            self._understand()
        except ConnectionError:  # ended with our words unread
            self._hear_end()
        else:
            self._hear_end()

    def _understand(self) -> None:
        heard = self._heard
        if heard[:1] == STARTED:
            del heard[:1]
            if self._options is not None and self._options.ready == "auto":
                self._be_told(True)
        if heard[:1] == READY:
            self._be_told(True)
        elif heard[:1] == FAILED and len(heard) > FAILURE.size:
            (size,) = FAILURE.unpack(heard[1 : 1 + FAILURE.size])
            text = heard[1 + FAILURE.size :]
            if len(text) == size:
                self.failure = text.decode(errors="replace")
                self._be_told(False)
        if self._pid and self._lost is not None:
            self.bind(self._pid, -1, 0)

    def _be_told(self, ready: bool) -> None:
        if not self.ready.done():
            self.ready.set_result(ready)

    def _hear_end(self) -> None:
        assert self._gate is not None
        self._loop.remove_reader(self._gate.fileno())
        self._understand()
        self._be_told(False)
        if self._lost is not None and not self._pid:
            self.settle(self._lost)

    def bind(self, pid: int, pidfd: int, code: int) -> None:
        """Watch the worker from now on, and let it out of its gate if it knows what to run.

        `pid` is 0 where the server is in another PID namespace. `pidfd`, or -1, is ours from now on.
        """
        if self.outcome.done():
            return
        if not pid and not code:
            pid = (syscalls.get_pid(pidfd) or 0) if pidfd >= 0 else 0
            if not pid:
                self._lose_number(pidfd)
                return
        worker = _bind_worker(self._loop, pid, pidfd, code)
        self.settle(worker)
        if isinstance(worker, AbstractChildProcess):
            worker.detach()  # until somebody else has its handle
            if self._abandoned:
                afork.kill(worker)
            elif self._options is None:
                self._last_resort = LastResort(worker)
        if self._options is not None:
            self._let_out(worker, self._options)
            self._write()

    def _lose_number(self, pidfd: int) -> None:
        """End a worker whose pid is not known, and so would be somebody else's. Without a pidfd it says itself who it is."""
        if pidfd < 0:
            self.lose_server(syscalls.error(errno.EMFILE, "the pidfd of a worker in another PID namespace was lost"))
            if self._options is None:
                self.dismiss()
            return
        syscalls.send_signal(pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # somebody else has reaped it
            syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        self.settle(
            OSError(
                errno.ENOTSUP,
                "the fork server is in another PID namespace, and what pid a worker has in this one cannot be learnt: "
                "it takes Linux 6.13, or a /proc of this namespace",
            )
        )

    def _let_out(self, worker: Outcome, options: Options) -> None:
        if isinstance(worker, AbstractChildProcess) and not self._abandoned:
            worker._attach(options.pgid)
            self._on_birth(worker)
            self._unwritten.append(memoryview(GO))

    def lose_server(self, reason: OSError) -> None:
        """Hear that the server has ended without a reply. If there is a worker all the same, it says so by its gate."""
        self._lost = reason
        if self._gate is None:
            self.settle(reason)
        elif self._pid:
            self.bind(self._pid, -1, 0)
        elif self.ready.done():  # there will be nothing more to hear
            self.settle(reason)

    def settle(self, outcome: Outcome) -> None:
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
        self.read()  # it has ended, and its last words may not have been heard
        return f"\n{self.failure}" if self.failure else ""

    def dismiss(self) -> None:
        """Have the worker end, as soon as it is known that there is one."""
        self._abandoned = True
        if self.outcome.done():
            worker = self.outcome.result()
            if isinstance(worker, AbstractChildProcess):
                worker.detach()
                afork.kill(worker)
        elif self._gate is None:
            self.settle(OSError(errno.ECANCELED, "cancelled"))
        elif self._options is None:
            with contextlib.suppress(OSError):  # ENOTCONN: it has ended
                self._gate.shutdown(socket.SHUT_WR)  # a worker that nobody knows of says so before it ends

    async def abandon(self) -> None:
        """End the worker, and reap it, however often we are cancelled meanwhile."""
        self.dismiss()
        deadline = self._loop.time() + REPLY_S
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
        self._give_up_last_resort()
        self._close_gate(is_orphaned=False)

    def _close_gate(self, *, is_orphaned: bool) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            if not is_orphaned:
                self._loop.remove_reader(gate.fileno())
                if self._is_writer:
                    self._loop.remove_writer(gate.fileno())
            afork.unregister_parent_socket(gate)
            gate.close()

    def _give_up_last_resort(self) -> None:
        if self._last_resort is not None:
            self._last_resort.close()
            self._last_resort = None

    def end_now(self, *, is_orphaned: bool) -> None:
        """Kill a worker without an order, and return when it is a zombie; another one loses its gate.

        `is_orphaned`: the loop is closed, or gone.
        """
        self._close_gate(is_orphaned=is_orphaned)
        if self._last_resort is not None:
            self._last_resort.end()


def _nobody(worker: AbstractChildProcess) -> None:
    """Be told of a worker that nobody has ordered."""


def _bind_worker(loop: asyncio.AbstractEventLoop, pid: int, pidfd: int, code: int) -> Outcome:
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
