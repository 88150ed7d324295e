"""The start gate of a forked child: a socket. The child waits on it until it is watched, then says on it that it is ready.

What can be made before the fork is made before it: after a fork, the kernel copies each page of memory that is written to.
"""

from __future__ import annotations

import asyncio
import contextlib
import os

from .._kernel import syscalls

RELEASE = b"g"  # from the parent: the child is watched, and may run
READY = b"r"  # from the child

_NUMBERS = (1 << 30) - 1  # then the numbers start again


class StartGate:
    """The parent's end of the gate, which the reaper holds, and the pid and pidfd of the child."""

    __slots__ = ("_is_ready", "is_watched", "number", "ready", "struct")

    context = None  # as of a Child whose next observer is internal

    def __init__(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        """Open nothing yet. The fork writes `struct`."""
        self.number = number
        self.ready: asyncio.Future[bool] = loop.create_future()  # True: the child is ready; False: it never will be
        self.struct = syscalls.new_child()
        self.is_watched = False  # the registry owns the pidfd, and reaps the child
        self._is_ready: bool | None = None

    def open(self) -> None:
        """Release the child."""
        with contextlib.suppress(ConnectionError):  # it was killed, and its exit will be reported
            os.write(self.struct.gate, RELEASE)

    def on_message(self, is_ready: bool) -> None:
        """Store whether the child is ready. Any thread may call this; `notify` completes the future."""
        self._is_ready = is_ready

    def notify(self) -> bool:
        """Complete `ready`, in the loop's thread. Return False: there is no other observer."""
        if not self.ready.done():
            self.ready.set_result(self._is_ready is True)
        return False

    def on_exit(self, _: object) -> None:
        """Complete `ready`, in the loop's thread: the child has ended. It may have sent READY just before."""
        if self.struct.gate >= 0 and not self.ready.done():
            try:
                word = os.read(self.struct.gate, 1)
            except (BlockingIOError, ConnectionError):  # the message is read already, or the child has not read ours
                word = b""
            self.ready.set_result(bool(word) or self._is_ready is True)


class StartGates:
    """The start gates of one loop's children that are not ready yet.

    Each has a number of its own, because the number of a closed descriptor is used again.
    """

    __slots__ = ("_gates", "_last")

    def __init__(self) -> None:
        self._gates: dict[int, StartGate] = {}
        self._last = 0

    def make(self, loop: asyncio.AbstractEventLoop) -> StartGate:
        """Return the gate of a child that is not forked yet."""
        self._last = self._last % _NUMBERS + 1
        return StartGate(loop, self._last)

    def add(self, gate: StartGate) -> None:
        """Add a gate that is about to be opened."""
        self._gates[gate.number] = gate

    def fail_all(self) -> None:
        """Complete all futures with False: nothing reads the gates any more."""
        for gate in tuple(self._gates.values()):
            if not gate.ready.done():
                gate.ready.set_result(False)

    def find(self, number: int) -> StartGate | None:
        """Return the gate; None if it was closed."""
        return self._gates.get(number)

    def forget(self) -> None:
        """In a forked child, whose copies of the descriptors are closed: make sure that nobody uses their numbers."""
        for gate in self._gates.values():
            gate.struct.gate = gate.struct.pidfd = -1
            gate.is_watched = True

    def give_up(self) -> None:
        """In a forked child, in the loop's thread: complete all futures, for the children are the parent's."""
        for gate in self._gates.values():
            gate.notify()

    def close(self, gate: StartGate) -> None:
        """Close a gate, if it is open. A child that still waits at it exits."""
        self._gates.pop(gate.number, None)
        syscalls.close_gate(gate.struct)  # after the pop: the number of the descriptor may be used again
