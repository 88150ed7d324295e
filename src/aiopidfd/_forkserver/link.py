"""The parent's end of the connection to a fork server, with the requests that have no reply yet."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import weakref
from collections import deque

from .._backends.sigchld_backend import settle_abandoned
from .._fork import afork
from .._fork.handle import AbstractChildProcess
from .._watch.loop_link import LoopLink
from .kill_switch import KillSwitch
from .process import REPLY
from .request import Request

# How many requests may be without a reply at a time. The server serves one after the other, and never runs out of requests.
# All of them, and their replies, fit into the buffers of the sockets, so neither side blocks.
WINDOW = 64

_READ_SIZE = 65536


class Link:
    """The parent's end of the connection to one fork server."""

    def __init__(self, loop: asyncio.AbstractEventLoop, control: socket.socket, server: AbstractChildProcess) -> None:
        """Own `control`, a connected socket."""
        self._loop = loop
        self._control = control
        self._unsent: deque[Request] = deque()
        self._in_flight: dict[int, Request] = {}
        self._number = 0
        self._is_eof = False
        self.idle: Request | None = None
        self.closing = False
        self.error: OSError | None = None
        self.is_loop_closed = False  # or the loop was collected
        self._registry = server._registry
        self._kill_switch = KillSwitch(server)
        self.handshake: asyncio.Future[str | OSError] = loop.create_future()  # "", a traceback, or an error
        control.setblocking(False)
        self._loop_link = LoopLink(weakref.ref(loop), control.fileno(), self._read, self._on_loop_closed)

    def pop_idle(self) -> Request:
        """Return a request without a task: that of the idle worker if it is usable, else a new one."""
        self._check_open()
        idle, self.idle = self.idle, None
        if idle is not None:
            if not idle.is_unusable:
                return idle
            idle.close()
        idle = Request(self._loop)
        self.submit(idle)
        return idle

    def prefork(self) -> Request:
        """Have the server fork an idle worker for the next call of afork(). Return its request."""
        if self.idle is None:
            self.idle = Request(self._loop)
            self.submit(self.idle)
        return self.idle

    def _cancel_idle(self) -> None:
        if self.idle is not None:
            self.idle.cancel()
            self.idle.close()

    async def kill_and_reap_idle(self) -> None:
        """Kill the idle worker, and reap it."""
        idle, self.idle = self.idle, None
        if idle is not None:
            await idle.kill_and_reap()
            idle.close()

    def submit(self, request: Request) -> None:
        """Send the request now, or when there is room. Its `outcome` is the result."""
        self._check_open()
        self._unsent.append(request)
        self._send()

    def _check_open(self) -> None:
        if self.error is not None:
            raise self.error
        if self.closing:
            raise OSError(errno.ESHUTDOWN, "the fork server is closing")

    def _send(self) -> None:
        while self._unsent and len(self._in_flight) < WINDOW and not self._is_eof:
            request = self._unsent[0]
            if not request.outcome.done():
                number = self._number + 1
                try:
                    request.send(self._control, number)
                except BlockingIOError:
                    return  # _read() calls this method again after the next reply
                except ConnectionError:
                    return  # the server has exited, and on_server_exit() is called soon
                except OSError as exc:
                    if exc.errno == errno.ETOOMANYREFS and self._in_flight:
                        return  # too many descriptors are in flight: handled as BlockingIOError
                    request.set_outcome(exc)
                else:
                    self._number = number
                    self._in_flight[number] = request
            self._unsent.popleft()

    def _read(self) -> None:
        while self._read_one():
            pass
        self._send()

    def _read_one(self) -> bool:
        """Read one reply. Return False if there is none."""
        if self._is_eof:
            return False
        try:
            reply, fds, _, _ = socket.recv_fds(self._control, _READ_SIZE, 1, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionError:
            # ECONNRESET: the server has exited before it read all requests. The kernel reports this once. Replies may
            # follow.
            return True
        if not reply:
            self._is_eof = True
            self._loop.remove_reader(self._control.fileno())
            self._close_wire()
            return False
        number, pid, code = REPLY.unpack(reply[: REPLY.size])
        # With code 0 there may be no pidfd: this process has too many open files (MSG_CTRUNC), or the server could not send
        # it. Then the pid is used. It stays valid while the worker waits for RELEASE.
        pidfd = fds[0] if fds else -1
        if fds:
            os.set_inheritable(pidfd, False)  # socket.recv_fds() ignores its flags (seen up to Python 3.13)
        if number:
            self._in_flight.pop(number).on_reply(pid, pidfd, code)
        else:
            self.handshake.set_result(reply[REPLY.size :].decode(errors="replace"))
        return True

    def close_sending(self) -> None:
        """Send no more requests. The server exits when it has served those that were sent."""
        self.closing = True
        self._cancel_idle()
        while self._unsent:
            self._unsent.popleft().set_outcome(OSError(errno.ESHUTDOWN, "the fork server is closing"))
        with contextlib.suppress(OSError):  # ENOTCONN: the server has exited
            self._control.shutdown(socket.SHUT_WR)

    def drop(self) -> None:
        """Have the server exit, since its ForkServer was dropped. May be called in any thread."""
        if self.error is not None:
            return
        if self._loop.is_running():
            self._loop_link.call(self.close_sending)
        else:  # the loop may never run again
            self._kill_now()
            self._registry.collect()
            settle_abandoned()  # if the registry is closed already, it has abandoned them: poll() may return before SIGCHLD

    def _on_loop_closed(self) -> None:
        """Kill and reap the server and the idle worker, since no loop watches them any more."""
        if self.error is None and not self._is_eof:
            self.is_loop_closed = True
            self._kill_now()
            settle_abandoned()  # reaps them if their registry has abandoned them; or the registry does so after this call

    def _kill_now(self) -> None:
        """Kill the server and the idle worker, and return when they are zombies."""
        self.closing = self._is_eof = True
        self.error = OSError(errno.ESHUTDOWN, "the fork server was dropped, or its event loop was closed")
        if not self.is_loop_closed:
            self._loop.remove_reader(self._control.fileno())
        self._close_wire()
        for request in {*self._in_flight.values(), *([self.idle] if self.idle else [])}:
            request.kill_now(is_loop_closed=self.is_loop_closed)
        self._kill_switch.kill()

    def _close_wire(self) -> None:
        afork.unregister_parent_socket(self._control)
        self._control.close()

    def on_server_exit(self, reason: OSError) -> None:
        """Fail the requests that have no worker. Requests whose worker exists without a reply get it from the worker."""
        if self.error is not None:
            return
        while self._read_one():
            pass
        self.error = reason
        self._kill_switch.close()
        if not self._is_eof:
            self._is_eof = True
            self._loop.remove_reader(self._control.fileno())
            self._close_wire()
        if not self.handshake.done():
            self.handshake.set_result(reason)
        for request in (*self._in_flight.values(), *self._unsent):
            request.on_server_exit(reason)
        self._cancel_idle()
        self._in_flight.clear()
        self._unsent.clear()
