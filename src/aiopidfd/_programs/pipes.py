"""Transports for the parent's ends of a program's pipes. They use public methods of the loop only, and are ready at once.

Both are subclasses of asyncio.Transport, whose methods raise NotImplementedError. So a method of the other direction raises
it, as on uvloop's pipes.

loop.connect_read_pipe and connect_write_pipe are coroutines: a start could be cancelled between two pipes, and each pipe
would cost about five callbacks and a future.
"""

from __future__ import annotations

import asyncio
import os
from io import FileIO
from typing import Any, Protocol

from .._watch.loop_link import add_reader, add_writer

_PIPE_SIZE = 65536  # the default capacity of a pipe
_HIGH_WATER = 65536  # as asyncio's


class PipeEnd(FileIO):
    """The parent's end of a pipe. It gives no ResourceWarning: the transport of its process gives one."""

    def __del__(self) -> None:
        self.close()


def make_pipe_end(pipe: FileIO) -> FileIO:
    """Return a PipeEnd for `pipe`, and close `pipe`. Out of descriptors: return `pipe` itself."""
    try:
        end = PipeEnd(os.dup(pipe.fileno()), pipe.mode)
    except OSError:  # EMFILE
        return pipe
    pipe.close()
    return end


class PipeProtocol(Protocol):
    """The part of asyncio.Protocol whose methods these transports call."""

    def data_received(self, data: bytes) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class ReadPipeTransport(asyncio.Transport):
    """Read from a pipe and call `data_received`, from `resume_reading` on."""

    _pipe: Any = None  # __del__ may run after an interrupted __init__

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
            self._protocol.connection_lost(None)  # without call_soon(): the caller is the loop, not the protocol

    def renew(self) -> None:
        """Add the reader again, so that it works while the protocol runs the loop inside this callback."""
        if self.is_reading():
            add_reader(self._loop, self._fd, self._read)

    def is_reading(self) -> bool:
        """Return whether the pipe is read."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """Stop reading until `resume_reading`."""
        if self.is_reading():
            self._paused = True
            self._loop.remove_reader(self._fd)

    def resume_reading(self) -> None:
        """Start reading, or continue."""
        if self._paused and not self._closing:
            self._paused = False
            add_reader(self._loop, self._fd, self._read)

    def is_closing(self) -> bool:
        """Return whether the pipe is closed."""
        return self._closing or self._loop.is_closed()

    def close(self) -> None:
        """Close the pipe. Data that is still in it is lost."""
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
    """Write to a pipe. Buffer what does not fit, and write it when the pipe is writable.

    As with asyncio's transport, a write after the close does nothing, and the transport closes when the other end closes.
    """

    _pipe: Any = None  # __del__ may run after an interrupted __init__

    def __init__(self, loop: asyncio.AbstractEventLoop, pipe: Any, protocol: PipeProtocol) -> None:
        """Own `pipe`, a file object."""
        super().__init__({"pipe": pipe})
        self._loop = loop
        self._pipe = pipe
        self._fd: int = pipe.fileno()
        self._protocol = protocol
        self._buffer = bytearray()
        self._closing = False
        self._paused = False  # whether the protocol is
        self._high, self._low = _HIGH_WATER, _HIGH_WATER // 4
        os.set_blocking(self._fd, False)

    def watch_peer(self) -> None:
        """Close the transport when the other end of the pipe is closed: this end is "readable" then."""
        # Not part of __init__: after an interrupt there, nobody could remove the reader, and libuv aborts the process if a
        # watched descriptor was closed.
        add_reader(self._loop, self._fd, self._closed_by_peer)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} fd={self._fd} {'closing' if self._closing else 'open'} {len(self._buffer)} buffered>"

    def __del__(self) -> None:
        if self._pipe is not None:
            self._pipe.close()  # the loop was closed before us

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write data. Buffer what does not fit."""
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
            except OSError as exc:  # EPIPE: the other end is closed
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
        """Add the writer again, so that it works while the protocol runs the loop inside this callback."""
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
        """Return True: the reader sees the end of file when the pipe is closed."""
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
        if self._loop.is_closed():  # the rest cannot be written any more
            self._pipe.close()
        else:
            self.write_eof()

    def abort(self) -> None:
        """Close the pipe now. Buffered data is lost."""
        self._close_now(None)

    def is_closing(self) -> bool:
        """Return whether the pipe is closed, or closes once all is written."""
        return self._closing or self._loop.is_closed()

    def get_write_buffer_size(self) -> int:
        """Return how many bytes are buffered."""
        return len(self._buffer)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the low and the high limit."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Pause the protocol above `high` buffered bytes. Resume it at `low` or below."""
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
