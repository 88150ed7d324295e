"""The reading end of a subprocess's pipe, by the loop's public methods alone and with nothing in between."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

_PIPE_SIZE = 65536  # what a pipe holds by default


class ReadPipeTransport(asyncio.ReadTransport):
    """Pass on what can be read from a pipe.

    loop.connect_read_pipe would do it, too, at the cost of five more callbacks and a future for each pipe.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pipe: Any,
        received: Callable[[bytes], object],
        lost: Callable[[Exception | None], object],
    ) -> None:
        """Own `pipe`, a file object; `received` gets the data, `lost` the end: None, or the error."""
        super().__init__({"pipe": pipe})
        self._loop = loop
        self._pipe = pipe
        self._fd: int = pipe.fileno()
        self._received = received
        self._lost = lost
        self._closing = False
        self._paused = True
        os.set_blocking(self._fd, False)

    def __repr__(self) -> str:
        state = "closed" if self._closing else "paused" if self._paused else "reading"
        return f"<{type(self).__name__} fd={self._fd} {state}>"

    def __del__(self) -> None:
        self._pipe.close()  # the loop was closed before us

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _PIPE_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._end(exc)
            return
        if data:
            self._received(data)
        else:
            self._end(None)

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
            self._loop.add_reader(self._fd, self._read)

    def is_closing(self) -> bool:
        """Return whether the pipe is closed."""
        return self._closing

    def close(self) -> None:
        """Close the pipe; what is still in it is lost."""
        self._end(None)

    def _end(self, exc: Exception | None) -> None:
        if self._closing:
            return
        if not self._paused:
            self._loop.remove_reader(self._fd)
        self._closing = True
        self._pipe.close()
        self._loop.call_soon(self._lost, exc)
