"""How a process ended: `ExitStatus`."""

from __future__ import annotations

import struct
from os import waitstatus_to_exitcode
from resource import struct_rusage
from typing import Final, Literal

Source = Literal["reaped", "peeked", "recovered", "lost", "not-child"]

# struct rusage as the kernel's waitid(2) writes it: two times as seconds and microseconds, then 14 counters, all longs.
_RUSAGE: Final = struct.Struct("@18l")
RUSAGE_SIZE: Final = _RUSAGE.size

LOST_RETURNCODE: Final = 255  # what asyncio reports for a child whose status somebody else has read


class ExitStatus:
    """How one process ended.

    Attributes:
        pid: the process.
        returncode: its exit code, or -signum if a signal killed it, as everywhere in Python. 255 if the status is lost;
            None if the process was not our child and the kernel does not tell (before Linux 6.15).
        core_dumped: whether it left a core dump.
        source: where the status comes from. "reaped": from waitid(2), and the zombie is gone. "peeked": from waitid(2),
            and the zombie was left for its owner (`reap=False`). "recovered": somebody else reaped the process, the
            kernel told us all the same (Linux 6.15). "lost": somebody else reaped it, nobody can tell any more.
            "not-child": it was another process's child.
    """

    __slots__ = ("_rusage", "core_dumped", "pid", "returncode", "source")

    def __init__(self, pid: int, status: int, source: Source, rusage: bytes | None = None) -> None:
        self.pid = pid
        self.source = source
        self.core_dumped = status & 0x80 != 0
        self._rusage = rusage
        self.returncode: int | None
        if source == "reaped":  # first, as nearly all are
            self.returncode = waitstatus_to_exitcode(status)
        elif source == "lost":
            self.returncode = LOST_RETURNCODE
        elif source == "not-child":
            self.returncode = None
        else:
            self.returncode = waitstatus_to_exitcode(status)

    @property
    def rusage(self) -> struct_rusage | None:
        """What the process used, as `resource.getrusage` shows it; None unless the status came from waitid(2).

        ru_maxrss, in KiB, is never below what the parent had at the fork: exec does not lower it.
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
