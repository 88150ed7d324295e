"""How a loop calls a registry: by public methods of any loop, in the loop's own thread, and in nobody's context.

Facts that this rests on:

* add_reader, call_soon and call_later capture the contextvars context of their caller and keep it as long as the callback.
  What we register for everybody is registered in an empty context, or the first user's would live as long as the loop.
* asyncio's loop runs a reader in the context of its registration, which cannot be entered twice. So a loop that is run again
  inside a reader (nest_asyncio) cannot call that reader; it logs an error and tries again, at once and for ever. A reader
  that is registered anew, before it calls the user's code, has a new context. uvloop's loop cannot be run again.
* A loop drops its readers when it is closed, and when it is garbage. That is all it tells us of its end.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Callable
from contextvars import Context
from functools import partial

_is_finalizing = sys.is_finalizing  # in reach while the interpreter exits, too


def add_reader(loop: asyncio.AbstractEventLoop, fd: int, callback: Callable[[], object]) -> None:
    """Do what `loop.add_reader` does, without keeping the caller's context. Called again, it renews the reader."""
    Context().run(loop.add_reader, fd, callback)


def add_writer(loop: asyncio.AbstractEventLoop, fd: int, callback: Callable[[], object]) -> None:
    """Do what `loop.add_writer` does, without keeping the caller's context. Called again, it renews the writer."""
    Context().run(loop.add_writer, fd, callback)


def can_nest(loop: asyncio.AbstractEventLoop | None) -> bool:
    """Return whether `loop` may be run again inside a callback, so that a reader must be renewed before it calls a user."""
    return isinstance(loop, asyncio.BaseEventLoop)


class LoopLink:
    """What a registry asks of its loop, which it does not own: the loop owns the registry."""

    __slots__ = ("_fd", "_kept", "_listener", "_loop", "_nests", "_on_loop_closed", "_on_readable", "depth")

    def __init__(
        self,
        loop: weakref.ReferenceType[asyncio.AbstractEventLoop],
        fd: int,
        on_readable: Callable[[], object],
        on_loop_closed: Callable[[], object],
    ) -> None:
        """Have `on_readable` called when `fd` is readable, and `on_loop_closed` when the loop is closed or gone."""
        self._loop: Callable[[], asyncio.AbstractEventLoop | None] = loop
        self._fd = fd
        self._nests = can_nest(loop())
        self.depth = 0  # how many calls of users are going on, each in a loop that the one before has run again
        self._on_readable, self._on_loop_closed = on_readable, on_loop_closed
        self._kept: _Listener | None = None
        listener = _Listener(on_readable, on_loop_closed)
        self._listener = weakref.ref(listener)
        self.call(self._listen, listener)

    def move(self, fd: int) -> None:
        """Listen to another descriptor; to none if `fd` is -1."""
        self.call(self._move, fd)

    def _move(self, fd: int) -> None:
        loop, listener, old_fd = self._loop(), self._listener(), self._fd
        if loop is None:
            return
        if listener is None:  # somebody else has registered a reader of that number
            listener = _Listener(self._on_readable, self._on_loop_closed)
            self._listener = weakref.ref(listener)
        else:
            loop.remove_reader(old_fd)
        self._fd = fd
        if fd >= 0:
            self._listen(listener)
        else:
            self._kept = listener  # or its end would pass for the loop's

    def _listen(self, listener: _Listener) -> None:
        loop = self._loop()
        if loop is not None:
            add_reader(loop, self._fd, listener)

    def drop(self) -> None:
        """Take the reader back, and call nothing any more."""
        loop, self._loop = self._loop(), _no_loop
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._fd)

    def renew(self) -> None:
        """Be callable by the loop even if it is run again inside the call that is going on, while `depth` is not 0.

        To register a reader takes long, and loops are hardly ever run again. One that is does it as its first thing.
        """
        loop = self._loop()
        if self._nests and loop is not None:
            loop.call_soon(self._renew_inside, context=Context())

    def _renew_inside(self) -> None:
        listener = self._listener()
        if self.depth and listener is not None and self._fd >= 0:
            self._listen(listener)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call what only the loop's thread may call: now, or when the loop runs."""
        loop = self._loop()
        if loop is None:
            return
        if asyncio._get_running_loop() is loop:
            function(*args)
        else:
            self._call_threadsafe(loop, function, *args)

    def call_soon(self, function: Callable[..., object], *args: object) -> None:
        """Have the loop call `function` in its next round."""
        loop = self._loop()
        if loop is not None:
            self._call_threadsafe(loop, function, *args)

    def call_later(self, delay_s: float, function: Callable[..., object], *args: object) -> None:
        """Have the loop call `function` after `delay_s`."""
        loop = self._loop()
        if loop is not None:
            self.call(partial(loop.call_later, context=Context()), delay_s, function, *args)

    @staticmethod
    def _call_threadsafe(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
        try:
            loop.call_soon_threadsafe(function, *args, context=Context())
        except RuntimeError:
            if not loop.is_closed():  # by now: then there is nothing to be called any more
                raise


def _no_loop() -> None:
    return None


class _Listener:
    """What the loop calls, and nobody else holds."""

    __slots__ = ("__weakref__", "_on_loop_closed", "_on_readable")

    def __init__(self, on_readable: Callable[[], object], on_loop_closed: Callable[[], object]) -> None:
        self._on_readable = on_readable
        self._on_loop_closed = on_loop_closed

    def __call__(self) -> None:
        self._on_readable()

    def __del__(self) -> None:
        if not _is_finalizing():  # as the interpreter exits the kernel closes what is open
            self._on_loop_closed()
