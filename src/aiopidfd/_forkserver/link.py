"""The parent's end of the wire to a fork server: which requests it has got, and what is left of them when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import weakref
from collections import deque

from .._backends.sigchld_backend import settle_abandoned
from .._fork import afork
from .._fork.handle import AbstractChildProcess
from .._watch.loop_link import LoopLink
from .end import LastResort
from .process import REPLY
from .request import Request

# How many requests the server has at a time. It takes them one after the other; a few more keep it busy, and all of them,
# with their replies, fit into the sockets' buffers, so that neither side ever waits for the other to read.
WINDOW = 64

_READ_SIZE = 65536


class Link:
    """The parent's end of the wire to one fork server."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wire: socket.socket, server: AbstractChildProcess) -> None:
        """Take over `wire`, a connected socket."""
        self._loop = loop
        self._wire = wire
        self._unsent: deque[Request] = deque()
        self._in_flight: dict[int, Request] = {}
        self._number = 0
        self._at_end = False
        self.spare: Request | None = None
        self.closing = False
        self.lost: OSError | None = None
        self.is_orphaned = False  # lost since the loop was closed, or is gone
        self._registry = server._registry
        self._last_resort = LastResort(server)
        self.greeting: asyncio.Future[str | OSError] = loop.create_future()  # what the server tells at its start
        wire.setblocking(False)
        self._loop_link = LoopLink(weakref.ref(loop), wire.fileno(), self._read, self._lose_loop)

    def take(self) -> Request:
        """Return a request that waits for its order: one whose worker is there already, if it can be."""
        self._check_open()
        spare, self.spare = self.spare, None
        if spare is not None:
            if not spare.is_spoiled:
                return spare
            spare.close()
        spare = Request(self._loop)
        self.submit(spare)
        return spare

    def stock(self) -> Request:
        """Have a worker forked for whoever comes next, while those that have come start theirs."""
        if self.spare is None:
            self.spare = Request(self._loop)
            self.submit(self.spare)
        return self.spare

    def _dismiss_spare(self) -> None:
        if self.spare is not None:
            self.spare.dismiss()
            self.spare.close()

    async def drop_spare(self) -> None:
        """End the worker that nobody has ordered anything of, and reap it."""
        spare, self.spare = self.spare, None
        if spare is not None:
            await spare.abandon()
            spare.close()

    def submit(self, request: Request) -> None:
        """Send the request as soon as there is room. Its `outcome` tells how it went."""
        self._check_open()
        self._unsent.append(request)
        self._send()

    def _check_open(self) -> None:
        if self.lost is not None:
            raise self.lost
        if self.closing:
            raise OSError(errno.ESHUTDOWN, "the fork server is being closed")

    def _send(self) -> None:
        while self._unsent and len(self._in_flight) < WINDOW and not self._at_end:
            request = self._unsent[0]
            if not request.outcome.done():
                number = self._number + 1
                try:
                    request.send(self._wire, number)
                except BlockingIOError:
                    return  # replies make room, and send more
                except ConnectionError:
                    return  # the server has ended, and `lose` is about to be called
                except OSError as exc:
                    if exc.errno == errno.ETOOMANYREFS and self._in_flight:
                        return  # too many descriptors on their way: as BlockingIOError
                    request.settle(exc)
                else:
                    self._number = number
                    self._in_flight[number] = request
            self._unsent.popleft()

    def _read(self) -> None:
        while self._read_one():
            pass
        self._send()

    def _read_one(self) -> bool:
        """Take one reply; return False if there is none."""
        if self._at_end:
            return False
        try:
            reply, fds, _, _ = socket.recv_fds(self._wire, _READ_SIZE, 1, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionError:
            # ECONNRESET: the server has died with requests unread. It is told once, and before what the server has written.
            return True
        if not reply:
            self._at_end = True
            self._loop.remove_reader(self._wire.fileno())
            self._close_wire()
            return False
        number, pid, code = REPLY.unpack(reply[: REPLY.size])
        # Without a descriptor in spite of code 0 we had no room for one (MSG_CTRUNC), or the server could not send it: then
        # the pid must do, which the worker keeps as long as it stands at its gate.
        pidfd = fds[0] if fds else -1
        if number:
            self._in_flight.pop(number).bind(pid, pidfd, code)
        else:
            self.greeting.set_result(reply[REPLY.size :].decode(errors="replace"))
        return True

    def finish(self) -> None:
        """Send no more requests: the server ends when it has done what it has got."""
        self.closing = True
        self._dismiss_spare()
        while self._unsent:
            self._unsent.popleft().settle(OSError(errno.ESHUTDOWN, "the fork server is being closed"))
        with contextlib.suppress(OSError):  # ENOTCONN: it has ended already
            self._wire.shutdown(socket.SHUT_WR)

    def drop(self) -> None:
        """End the server, in any thread: nobody can ask for a worker any more."""
        if self.lost is not None:
            return
        if self._loop.is_running():
            self._loop_link.call(self.finish)
        else:  # it may never run again
            self._end_now()
            self._registry.collect()

    def _lose_loop(self) -> None:
        """Leave nothing behind: the loop is closed, or gone, and nobody will hear of the server or its workers any more."""
        if self.lost is None and not self._at_end:
            self.is_orphaned = True
            self._end_now()
            settle_abandoned()  # of which the registry has made those processes, unless it does so only now

    def _end_now(self) -> None:
        """Kill the server and the worker without an order, and return when they are zombies."""
        self.closing = self._at_end = True
        self.lost = OSError(errno.ESHUTDOWN, "the fork server was dropped, or its loop closed")
        if not self.is_orphaned:
            self._loop.remove_reader(self._wire.fileno())
        self._close_wire()
        for request in {*self._in_flight.values(), *([self.spare] if self.spare else [])}:
            request.end_now(is_orphaned=self.is_orphaned)
        self._last_resort.end()

    def _close_wire(self) -> None:
        afork.unregister_parent_socket(self._wire)
        self._wire.close()

    def lose(self, reason: OSError) -> None:
        """Know that the server has ended. Requests that it has not done fail; workers that it has made are found."""
        if self.lost is not None:
            return
        while self._read_one():
            pass
        self.lost = reason
        self._last_resort.close()
        if not self._at_end:
            self._at_end = True
            self._loop.remove_reader(self._wire.fileno())
            self._close_wire()
        if not self.greeting.done():
            self.greeting.set_result(reason)
        for request in (*self._in_flight.values(), *self._unsent):
            request.lose_server(reason)
        self._dismiss_spare()
        self._in_flight.clear()
        self._unsent.clear()
