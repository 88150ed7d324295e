"""How a process ended: `ExitStatus`."""

from __future__ import annotations

import struct
from os import waitstatus_to_exitcode
from resource import struct_rusage
from typing import Final, Literal

Source = Literal["reaped", "peeked", "recovered", "lost", "not-child"]

# struct rusage as waitid(2) writes it: two times, each in seconds and microseconds, then 14 counters. All are longs.
_RUSAGE: Final = struct.Struct("@18l")
RUSAGE_SIZE: Final = _RUSAGE.size

LOST_RETURNCODE: Final = 255  # as asyncio reports for a child that another waitpid() reaped


class ExitStatus:
    """How one process ended.

    Attributes:
        pid: the process.
        returncode: the exit code, or -signum if a signal killed the process, as everywhere in Python. 255 if the status is
            lost. None if the process was not our child and the kernel does not report its status (before Linux 6.15).
        core_dumped: whether the process left a core dump.
        source: where the status comes from.
            "reaped": from waitid(2), and the zombie is gone.
            "peeked": from waitid(2), and the zombie was left for its owner (`reap=False`).
            "recovered": another waitpid() reaped the process first. The kernel has reported the status (Linux 6.15).
            "lost": another waitpid() reaped the process first. The status is unknown.
            "not-child": the process was another process's child. The status is unknown.
    """

    __slots__ = ("_rusage", "core_dumped", "pid", "returncode", "source")

    def __init__(self, pid: int, status: int, source: Source, rusage: bytes | None = None) -> None:
        self.pid = pid
        self.source = source
        self.core_dumped = status & 0x80 != 0
        self._rusage = rusage
        self.returncode: int | None
        if source == "reaped":  # the most frequent one first
            self.returncode = waitstatus_to_exitcode(status)
        elif source == "lost":
            self.returncode = LOST_RETURNCODE
        elif source == "not-child":
            self.returncode = None
        else:
            self.returncode = waitstatus_to_exitcode(status)

    @property
    def rusage(self) -> struct_rusage | None:
        """The resources that the process used, as from `resource.getrusage`. None unless the status is from waitid(2).

        ru_maxrss (in KiB) includes the size of the parent at the time of the fork: exec does not lower it.
        """
        if self._rusage is None:
            return None
        utime_s, utime_us, stime_s, stime_us, *counters = _RUSAGE.unpack(self._rusage)
        return struct_rusage((utime_s + utime_us / 1e6, stime_s + stime_us / 1e6, *counters))

    def __repr__(self) -> str:
        core = ", core dumped" if self.core_dumped else ""
        return f"<ExitStatus pid={self.pid} returncode={self.returncode}{core} source={self.source!r}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExitStatus):
            return NotImplemented
        mine = (self.pid, self.returncode, self.core_dumped, self.source, self._rusage)
        return mine == (other.pid, other.returncode, other.core_dumped, other.source, other._rusage)

    def __hash__(self) -> int:
        return hash((self.pid, self.returncode, self.core_dumped, self.source))
