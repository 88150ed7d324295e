"""How a loop calls a registry: by public methods of any loop, in the loop's own thread, in an empty context.

Facts that this module rests on:

* add_reader, call_soon and call_later capture the contextvars context of their caller and keep it as long as the callback.
  The registry registers its callbacks in an empty context. Otherwise the context of its first user would live as long as
  the loop.
* asyncio's loop runs a reader in the context in which it was registered. A context cannot be entered twice. So a loop that
  is run again inside a reader (nest_asyncio) cannot call that reader; it logs an error and tries again, without end. A
  reader that is registered again has a new context. uvloop's loop cannot be run again inside a callback.
* A loop drops its readers when it is closed, and when it is garbage collected. No other event reports that a loop is gone.
* To register a reader takes some 25 us on asyncio, and loops are hardly ever run inside a callback. So the reader is
  registered again only when that happens.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Callable
from contextvars import Context
from functools import partial

_is_finalizing = sys.is_finalizing  # kept here, so that it can be called while the interpreter exits


def add_reader(loop: asyncio.AbstractEventLoop, fd: int, callback: Callable[[], object]) -> None:
    """Call `loop.add_reader` in an empty context. A second call gives the reader a new context."""
    Context().run(loop.add_reader, fd, callback)


def add_writer(loop: asyncio.AbstractEventLoop, fd: int, callback: Callable[[], object]) -> None:
    """Call `loop.add_writer` in an empty context. A second call gives the writer a new context."""
    Context().run(loop.add_writer, fd, callback)


def can_nest(loop: asyncio.AbstractEventLoop | None) -> bool:
    """Return whether `loop` can be run again inside a callback. Then a reader is renewed before it calls user code."""
    return isinstance(loop, asyncio.BaseEventLoop)


class LoopLink:
    """The calls that a registry makes on its loop.

    The loop owns the registry. The registry has a weak reference to the loop.
    """

    __slots__ = ("_fd", "_kept", "_listener", "_loop", "_nests", "_on_loop_closed", "_on_readable", "depth")

    def __init__(
        self,
        loop: weakref.ReferenceType[asyncio.AbstractEventLoop],
        fd: int,
        on_readable: Callable[[], object],
        on_loop_closed: Callable[[], object],
    ) -> None:
        """Have the loop call `on_readable` when `fd` is readable, and `on_loop_closed` when it is closed or garbage."""
        self._loop: Callable[[], asyncio.AbstractEventLoop | None] = loop
        self._fd = fd
        self._nests = can_nest(loop())
        self.depth = 0  # how many calls of user code are running, one inside the other
        self._on_readable, self._on_loop_closed = on_readable, on_loop_closed
        self._kept: _Listener | None = None
        listener = _Listener(on_readable, on_loop_closed)
        self._listener = weakref.ref(listener)
        self.call(self._listen, listener)

    def move(self, fd: int) -> None:
        """Read from another descriptor; from none if `fd` is -1."""
        self.call(self._move, fd)

    def _move(self, fd: int) -> None:
        loop, listener, old_fd = self._loop(), self._listener(), self._fd
        if loop is None:
            return
        if listener is None:  # other code has registered a reader for that descriptor number
            listener = _Listener(self._on_readable, self._on_loop_closed)
            self._listener = weakref.ref(listener)
        else:
            loop.remove_reader(old_fd)
        self._fd = fd
        if fd >= 0:
            self._listen(listener)
        else:
            self._kept = listener  # else its __del__ would report that the loop is closed

    def _listen(self, listener: _Listener) -> None:
        loop = self._loop()
        if loop is not None:
            add_reader(loop, self._fd, listener)

    def drop(self) -> None:
        """Remove the reader. From now on every call does nothing."""
        loop, self._loop = self._loop(), _no_loop
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._fd)

    def renew(self) -> None:
        """Make sure that the loop can call the reader even if user code runs the loop again inside the current call.

        A nested run starts with `_renew_inside`. In any other run `depth` is 0 by then, and `_renew_inside` does nothing.
        """
        loop = self._loop()
        if self._nests and loop is not None:
            loop.call_soon(self._renew_inside, context=Context())

    def _renew_inside(self) -> None:
        listener = self._listener()
        if self.depth and listener is not None and self._fd >= 0:
            self._listen(listener)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call a function in the loop's thread: at once if this is the thread, else in the next round of the loop."""
        loop = self._loop()
        if loop is None:
            return
        if asyncio._get_running_loop() is loop:
            function(*args)
        else:
            self._call_threadsafe(loop, function, *args)

    def call_soon(self, function: Callable[..., object], *args: object) -> None:
        """Call a function in the next round of the loop. Any thread may call this."""
        loop = self._loop()
        if loop is not None:
            self._call_threadsafe(loop, function, *args)

    def call_later(self, delay_s: float, function: Callable[..., object], *args: object) -> None:
        """Call a function in the loop's thread after `delay_s`."""
        loop = self._loop()
        if loop is not None:
            self.call(partial(loop.call_later, context=Context()), delay_s, function, *args)

    @staticmethod
    def _call_threadsafe(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
        try:
            loop.call_soon_threadsafe(function, *args, context=Context())
        except RuntimeError:
            if not loop.is_closed():  # it was closed just now, and nothing has to be called
                raise


def _no_loop() -> None:
    return None


class _Listener:
    """The reader. Only the loop has a reference to it, so `__del__` shows that the loop is closed or gone."""

    __slots__ = ("__weakref__", "_on_loop_closed", "_on_readable")

    def __init__(self, on_readable: Callable[[], object], on_loop_closed: Callable[[], object]) -> None:
        self._on_readable = on_readable
        self._on_loop_closed = on_loop_closed

    def __call__(self) -> None:
        self._on_readable()

    def __del__(self) -> None:
        if not _is_finalizing():  # when the interpreter exits the kernel closes what is open
            self._on_loop_closed()
