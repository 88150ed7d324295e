"""The standard streams of a program that is being started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from io import FileIO
from typing import Any, Final

from .pipes import PipeEnd


class NeedsPopen(Exception):
    """The call has options that need subprocess.Popen: it supports them, or raises the right error."""


def check_descriptor(value: Any) -> int:
    """Return `value` if it can be a descriptor. NeedsPopen if not."""
    if not isinstance(value, int) or not 0 <= value <= 0x7FFFFFFF:
        raise NeedsPopen
    return value


class Streams:
    """The child's ends of the three standard streams, and the parent's ends of those that are pipes."""

    _closing: Iterator[None] = iter(())  # until __init__ makes one

    def __init__(self, stdin: Any, stdout: Any, stderr: Any) -> None:
        self.parent_ends: list[FileIO | None] = [None, None, None]
        self._to_close: list[int] = []  # the child has copies of them
        # `any` takes a descriptor and closes it in one C call, so a KeyboardInterrupt closes each exactly once. os.close()
        # returns None, so `any` continues.
        self._closing = map(os.close, self._to_close)
        self._devnull = -1  # one for all streams
        made = [-1, -1, -1]
        try:
            for number, wanted in enumerate((stdin, stdout, stderr)):
                if wanted is not None:
                    made[number] = self._make(number, wanted, made[1])
        except BaseException:
            self.close_child_ends()
            self.close_parent_ends()
            raise
        self.child_fds = made

    def _make(self, number: int, wanted: Any, stdout: int) -> int:
        if wanted == subprocess.PIPE:
            read, write = os.pipe()
            child, parent = (read, write) if number == 0 else (write, read)
            self._to_close.append(child)
            self.parent_ends[number] = PipeEnd(parent, "wb" if number == 0 else "rb")
            return child
        if wanted == subprocess.DEVNULL:
            if self._devnull < 0:
                self._devnull = os.open(os.devnull, os.O_RDWR)
                self._to_close.append(self._devnull)
            return self._devnull
        if wanted == subprocess.STDOUT and number == 2 and stdout >= 0:
            return stdout
        return check_descriptor(wanted if isinstance(wanted, int) else wanted.fileno())

    def close_child_ends(self) -> None:
        """Close the child's ends of the pipes, and /dev/null if it was opened."""
        any(self._closing)

    # After an interrupt, nothing else closes them.
    __del__ = close_child_ends

    def close_parent_ends(self) -> None:
        """Close the parent's ends of the pipes."""
        for stream in self.parent_ends:
            if stream is not None:
                stream.close()


# For every program that inherits all three streams. It owns no descriptor.
INHERITED: Final = Streams(None, None, None)
