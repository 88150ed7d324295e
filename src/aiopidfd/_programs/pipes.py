"""Our ends of a subprocess's pipes: the same on every loop, by its public methods alone, and ready at once."""

from __future__ import annotations

import asyncio
import os
from io import FileIO
from typing import Any, Protocol

from .._watch.loop_link import add_reader, add_writer

# Both are asyncio.Transport, whose methods raise NotImplementedError: so what only the other direction has raises it, as on
# uvloop's pipes.

# loop.connect_read_pipe and connect_write_pipe would do, too, but they have to be waited for: a subprocess could be
# cancelled half-made, and each pipe costs some five callbacks and a future.

_PIPE_SIZE = 65536  # what a pipe holds by default
_HIGH_WATER = 65536  # asyncio's default, too


class PipeEnd(FileIO):
    """Our end of a pipe. It does not warn of being left open: its process's transport does, and once is enough."""

    def __del__(self) -> None:
        self.close()


def make_pipe_end(pipe: FileIO) -> FileIO:
    """Return a PipeEnd for `pipe`, which is closed; `pipe` itself where there is no descriptor left for that."""
    try:
        end = PipeEnd(os.dup(pipe.fileno()), pipe.mode)
    except OSError:
        return pipe
    pipe.close()
    return end


class PipeProtocol(Protocol):
    """Who is told of a pipe's events: a part of asyncio.Protocol."""

    def data_received(self, data: bytes) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class ReadPipeTransport(asyncio.Transport):
    """Pass on what can be read from a pipe, once `resume_reading` was called."""

    _pipe: Any = None  # until it is ours: a constructor that is interrupted has nothing to close

    def __init__(self, loop: asyncio.AbstractEventLoop, pipe: Any, protocol: PipeProtocol) -> None:
        """Own `pipe`, a file object."""
        super().__init__({"pipe": pipe})
        self._loop = loop
        self._pipe = pipe
        self._fd: int = pipe.fileno()
        self._protocol = protocol
        self._closing = False
        self._paused = True
        os.set_blocking(self._fd, False)

    def __repr__(self) -> str:
        state = "closed" if self._closing else "paused" if self._paused else "reading"
        return f"<{type(self).__name__} fd={self._fd} {state}>"

    def __del__(self) -> None:
        if self._pipe is not None:
            self._pipe.close()  # the loop was closed before us

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _PIPE_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._release()
            self._protocol.connection_lost(exc)
            return
        if data:
            self._protocol.data_received(data)
        else:
            self._release()
            self._protocol.connection_lost(None)  # at once: it is the loop that has called us, and not the protocol

    def renew(self) -> None:
        """Go on reading even if the loop is run again inside the call that is going on."""
        if self.is_reading():
            add_reader(self._loop, self._fd, self._read)

    def is_reading(self) -> bool:
        """Return whether data is passed on now."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """Stop passing on data, until `resume_reading`."""
        if self.is_reading():
            self._paused = True
            self._loop.remove_reader(self._fd)

    def resume_reading(self) -> None:
        """Pass on data from now on."""
        if self._paused and not self._closing:
            self._paused = False
            add_reader(self._loop, self._fd, self._read)

    def is_closing(self) -> bool:
        """Return whether the pipe is closed."""
        return self._closing or self._loop.is_closed()

    def close(self) -> None:
        """Close the pipe; what is still in it is lost."""
        if self._loop.is_closed():
            self._pipe.close()
        elif not self._closing:
            self._release()
            self._loop.call_soon(self._protocol.connection_lost, None)

    abort = close

    def _release(self) -> None:
        if not self._paused:
            self._loop.remove_reader(self._fd)
        self._closing = True
        self._pipe.close()


class WritePipeTransport(asyncio.Transport):
    """Write to a pipe, what does not fit into it when it can take more.

    As asyncio's: to write once it is closed does nothing; the other end's closing closes it.
    """

    _pipe: Any = None  # until it is ours: a constructor that is interrupted has nothing to close

    def __init__(self, loop: asyncio.AbstractEventLoop, pipe: Any, protocol: PipeProtocol) -> None:
        """Own `pipe`, a file object."""
        super().__init__({"pipe": pipe})
        self._loop = loop
        self._pipe = pipe
        self._fd: int = pipe.fileno()
        self._protocol = protocol
        self._buffer = bytearray()
        self._closing = False
        self._paused = False  # the protocol
        self._high, self._low = _HIGH_WATER, _HIGH_WATER // 4
        os.set_blocking(self._fd, False)

    def watch_peer(self) -> None:
        """Be closed when nobody can read any more."""
        # An end for writing is "readable" then. Not in __init__, whose object nobody has yet who would remove the reader if
        # he is interrupted: libuv ends the process over a reader that is closed.
        add_reader(self._loop, self._fd, self._closed_by_peer)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} fd={self._fd} {'closing' if self._closing else 'open'} {len(self._buffer)} buffered>"

    def __del__(self) -> None:
        if self._pipe is not None:
            self._pipe.close()  # the loop was closed before us

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write data, or buffer what does not fit."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._closing or not data:
            return
        rest = memoryview(data).cast("B")
        if not self._buffer:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as exc:  # EPIPE: nobody can read any more
                self._close_now(exc)
                return
            if not rest:
                return
            add_writer(self._loop, self._fd, self._write_more)
        self._buffer += rest
        self._notify_flow()

    def _write_more(self) -> None:
        try:
            del self._buffer[: os.write(self._fd, self._buffer)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._close_now(exc)
            return
        if not self._buffer:
            self._loop.remove_writer(self._fd)
            if self._closing:
                self._finish(None)
        self._notify_flow()  # last: the protocol may run the loop

    def renew(self) -> None:
        """Go on writing even if the loop is run again inside the call that is going on."""
        if self._buffer:
            add_writer(self._loop, self._fd, self._write_more)

    def _closed_by_peer(self) -> None:
        self._close_now(BrokenPipeError() if self._buffer else None)

    def _notify_flow(self) -> None:
        size = len(self._buffer)
        if not self._paused and size > self._high:
            self._paused = True
            self._protocol.pause_writing()
        elif self._paused and size <= self._low:
            self._paused = False
            self._protocol.resume_writing()

    def can_write_eof(self) -> bool:
        """Return True: to close a pipe is to end what is read from it."""
        return True

    def write_eof(self) -> None:
        """Close the pipe once all is written."""
        if self._closing:
            return
        self._closing = True
        if not self._buffer:
            self._finish(None)

    def close(self) -> None:
        """Close the pipe once all is written."""
        if self._loop.is_closed():  # nobody will write it
            self._pipe.close()
        else:
            self.write_eof()

    def abort(self) -> None:
        """Close the pipe, and drop what is not written."""
        self._close_now(None)

    def is_closing(self) -> bool:
        """Return whether the pipe is closed, or will be."""
        return self._closing or self._loop.is_closed()

    def get_write_buffer_size(self) -> int:
        """Return how many bytes are not written yet."""
        return len(self._buffer)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the limits, low and high."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set above how many buffered bytes the protocol is paused, and down to how many it is resumed."""
        if high is None:
            high = _HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low
        self._notify_flow()

    def _close_now(self, exc: Exception | None) -> None:
        if self._pipe.closed:
            return
        self._closing = True
        if self._buffer:
            self._loop.remove_writer(self._fd)
            self._buffer.clear()
        self._finish(exc)

    def _finish(self, exc: Exception | None) -> None:
        self._loop.remove_reader(self._fd)
        self._pipe.close()
        self._loop.call_soon(self._protocol.connection_lost, exc)
