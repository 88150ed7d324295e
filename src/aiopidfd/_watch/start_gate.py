"""The gate of one forked child: where it waits until it is watched, and on which it says that it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import os

from .._kernel import syscalls

RELEASE = b"g"  # from the parent: you are watched
READY = b"r"

_NUMBERS = (1 << 30) - 1  # before the first one is used again


class StartGate:
    """The parent's end of it, which the reaper listens to, and what there is of the child.

    Made before the fork, as all that can be: after it, every page that is written to is copied first.
    """

    __slots__ = ("_is_ready", "is_watched", "number", "ready", "struct")

    context = None  # as a child whose next observer is one of ours

    def __init__(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        """Open nothing yet: `struct` is written when the child is forked."""
        self.number = number
        self.ready: asyncio.Future[bool] = loop.create_future()  # whether the child is ready, or never will be
        self.struct = syscalls.new_child()
        self.is_watched = False  # then what there is of the child is the registry's
        self._is_ready: bool | None = None

    def open(self) -> None:
        """Let the child out."""
        with contextlib.suppress(ConnectionError):  # killed already; its end is on the way to us
            os.write(self.struct.gate, RELEASE)

    def on_message(self, is_ready: bool) -> None:
        """Note, in any thread, whether the child is ready."""
        self._is_ready = is_ready

    def notify(self) -> bool:
        """Tell who waits, in the loop's thread; return False: there is nobody else to be told."""
        if not self.ready.done():
            self.ready.set_result(self._is_ready is True)
        return False

    def on_exit(self, _: object) -> None:
        """Note, in the loop's thread, that the child has ended. It may have sent READY just before."""
        if self.struct.gate >= 0 and not self.ready.done():
            try:
                word = os.read(self.struct.gate, 1)
            except (BlockingIOError, ConnectionError):  # read already and about to be told, or ended with our word unread
                word = b""
            self.ready.set_result(bool(word) or self._is_ready is True)


class StartGates:
    """The gates of one loop's children that are not ready yet, by number: a descriptor's may soon be another gate's."""

    __slots__ = ("_gates", "_last")

    def __init__(self) -> None:
        self._gates: dict[int, StartGate] = {}
        self._last = 0

    def make(self, loop: asyncio.AbstractEventLoop) -> StartGate:
        """Make the gate of a child that is to be forked."""
        self._last = self._last % _NUMBERS + 1
        return StartGate(loop, self._last)

    def add(self, gate: StartGate) -> None:
        """Know a gate that is about to be opened."""
        self._gates[gate.number] = gate

    def fail_all(self) -> None:
        """Give up those that are waited for: nobody hears them any more."""
        for gate in tuple(self._gates.values()):
            if not gate.ready.done():
                gate.ready.set_result(False)

    def find(self, number: int) -> StartGate | None:
        """Return the gate, unless it was closed."""
        return self._gates.get(number)

    def forget(self) -> None:
        """In a forked child, where their descriptors are closed: know none of the numbers, and undo nothing."""
        for gate in self._gates.values():
            gate.struct.gate = gate.struct.pidfd = -1
            gate.is_watched = True

    def give_up(self) -> None:
        """Say of each, in the loop's thread, that its child will never be ready here."""
        for gate in self._gates.values():
            gate.notify()

    def close(self, gate: StartGate) -> None:
        """Close it, if it is open. A child that still stands there ends."""
        self._gates.pop(gate.number, None)
        syscalls.close_gate(gate.struct)  # whatever is heard from now on: the number may be somebody else's
