"""/proc: whether it can be used, and what it shows of a process without a pidfd.

Facts:

* /proc may not be mounted. It may belong to another PID namespace, where the same pid is another process. "NSpid:" in
  /proc/self/status has one number for each namespace from that of /proc to our own: a single number means that they are the
  same.
* With hidepid=1, /proc answers EPERM for processes of other users. With hidepid=2 it answers ENOENT, as for processes that
  have ended.
* /proc/PID/stat has the start time, which distinguishes a process from a later one with the same pid. State Z means that the
  main thread has ended. The process has ended when there is no other thread: num_threads is 1, since the main thread counts
  until it is reaped.
* The flags in /proc/PID/stat (the ninth field) contain PF_FORKNOEXEC from the fork until exec. A zombie keeps the flag.
* kill(pid, 0) answers ESRCH if no process has the pid, EPERM if a process of another user has it. Zombies and threads have
  a pid, too.
"""

from __future__ import annotations

import os
from typing import NamedTuple

_PF_FORKNOEXEC = 0x40


def find_obstacle() -> str | None:
    """Return why /proc does not show all processes. None if it does."""
    mismatch = _find_mismatch()
    if mismatch is None and not os.access("/proc/1/stat", os.R_OK) and _exists(1):
        return "hides other users' processes (hidepid)"
    return mismatch


def _find_mismatch() -> str | None:
    """Return why the pids in /proc are not ours. None if they are."""
    try:
        with open("/proc/self/status", "rb") as status:
            namespaces = [line for line in status if line.startswith(b"NSpid:")]
    except OSError as exc:  # ENOENT: not mounted, or of a namespace without us. EMFILE, ENFILE: out of descriptors
        return f"cannot be read ({exc.strerror})"
    if namespaces and len(namespaces[0].split()) != 2:
        return "is that of another PID namespace"
    return None


def _exists(pid: int) -> bool:
    """Return whether a process or a thread has this pid."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        pass
    return True


class ProcState(NamedTuple):
    """The state of a process that was not reaped."""

    start_time: bytes | None  # to be compared only; None if /proc does not show it
    has_ended: bool  # whether it is a zombie; False if /proc does not show it


def read_state(pid: int) -> ProcState | None:
    """Return the state of the process `pid`. None if there is no such process, or `pid` is the ID of a thread."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/status", "rb") as status:
            is_thread = any(line.startswith(b"Tgid:") and int(line.split()[1]) != pid for line in status)
    except OSError:  # ENOENT, ESRCH: it was reaped, or is hidden. EPERM, EACCES: it is hidden. EMFILE, ENFILE
        pass
    else:
        if len(fields) > 19 and _find_mismatch() is None:
            return None if is_thread else ProcState(fields[19], fields[0] in (b"Z", b"X") and int(fields[17]) <= 1)
    return ProcState(None, has_ended=False) if _exists(pid) else None


def has_called_exec(pid: int) -> bool:
    """Return whether a forked child, running or a zombie, has called exec. False where /proc does not show it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            flags = int(stat.read().rpartition(b")")[2].split()[6])
    except OSError:  # ENOENT, ESRCH: it was reaped, or there is no /proc. EMFILE, ENFILE: out of descriptors
        return False
    return not flags & _PF_FORKNOEXEC and _find_mismatch() is None


def read_pid(pidfd: int) -> int | None:
    """Return the pid behind `pidfd`. 0: the process was reaped, or `pidfd` is no pidfd. None: /proc does not show it."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}", "rb") as fdinfo:
            pids = [int(line.split()[1]) for line in fdinfo if line.startswith(b"Pid:")]
    except OSError:  # ENOENT: no /proc. EMFILE, ENFILE
        return None
    if _find_mismatch() is not None:
        return None
    return max(pids[0], 0) if pids else 0
