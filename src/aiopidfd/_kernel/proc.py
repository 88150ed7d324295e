"""/proc: whether it can be used, and what it tells of a process of which there is no pidfd.

Facts that this rests on:

* /proc may not be mounted, or be that of another PID namespace, where numbers mean other processes. "NSpid:" in the status
  of a process has one number for each namespace from that of /proc to its own: one alone means that they are the same.
* Mounted with hidepid=1 it answers EPERM for other users' processes, with hidepid=2 ENOENT as for those that have ended.
* /proc/PID/stat: the time of the start tells a process from a later one of the same pid. State Z is that of the main thread:
  the process has ended once there is no other thread (num_threads is 1; the main thread counts until it is reaped).
* Its flags (the ninth field) have PF_FORKNOEXEC from the fork until exec, also once it is a zombie.
* kill(pid, 0) answers ESRCH if nobody has the number, EPERM if another user's process has it. A zombie has it, too, and so
  has a thread.
"""

from __future__ import annotations

import os
from typing import NamedTuple

_PF_FORKNOEXEC = 0x40


def find_obstacle() -> str | None:
    """Say why /proc does not tell of every process that there is; None if it does."""
    mismatch = _find_mismatch()
    if mismatch is None and not os.access("/proc/1/stat", os.R_OK) and _exists(1):
        return "hides other users' processes (hidepid)"
    return mismatch


def _find_mismatch() -> str | None:
    """Say why the numbers in /proc are not those of our processes; None if they are."""
    try:
        with open("/proc/self/status", "rb") as status:
            namespaces = [line for line in status if line.startswith(b"NSpid:")]
    except OSError as exc:  # ENOENT: not mounted, or of a namespace in which we are not. EMFILE, ENFILE: not known now
        return f"cannot be read ({exc.strerror})"
    if namespaces and len(namespaces[0].split()) != 2:
        return "is that of another PID namespace"
    return None


def _exists(pid: int) -> bool:
    """Return whether a process, or a thread, has the number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        pass
    return True


class ProcState(NamedTuple):
    """What can be seen of a process that was not reaped."""

    start_time: bytes | None  # when, for comparison; None if that cannot be seen
    has_ended: bool  # it is a zombie; a zombie that cannot be seen passes for alive


def read_state(pid: int) -> ProcState | None:
    """Return what can be seen of the process `pid`; None if there is none, or `pid` is a thread's."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/status", "rb") as status:
            is_thread = any(line.startswith(b"Tgid:") and int(line.split()[1]) != pid for line in status)
    except OSError:  # ENOENT, ESRCH: it has ended, or is not to be seen. EPERM, EACCES: not to be seen. EMFILE, ENFILE
        pass
    else:
        if len(fields) > 19 and _find_mismatch() is None:
            return None if is_thread else ProcState(fields[19], fields[0] in (b"Z", b"X") and int(fields[17]) <= 1)
    return ProcState(None, has_ended=False) if _exists(pid) else None


def has_called_exec(pid: int) -> bool:
    """Return whether a child that was not reaped has called exec since it was forked; False where /proc does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            flags = int(stat.read().rpartition(b")")[2].split()[6])
    except OSError:  # ENOENT, ESRCH: it was reaped by now, or there is no /proc. EMFILE, ENFILE
        return False
    return not flags & _PF_FORKNOEXEC and _find_mismatch() is None


def read_pid(pidfd: int) -> int | None:
    """Return the pid of the process behind `pidfd`, 0 if it was reaped, or that is no pidfd; None if /proc does not tell."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}", "rb") as fdinfo:
            pids = [int(line.split()[1]) for line in fdinfo if line.startswith(b"Pid:")]
    except OSError:  # ENOENT: no /proc. EMFILE, ENFILE
        return None
    if _find_mismatch() is not None:
        return None
    return max(pids[0], 0) if pids else 0
