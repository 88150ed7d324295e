"""Where a run took place, without what would tell whose machine it was."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

from .programs import find_compiler

_PACKAGES = ("aiopidfd", "uvloop", "trio", "anyio", "aiotools")


def describe() -> dict[str, str]:
    """Return the facts that a reader needs to judge the figures."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": f"{_find_in('/proc/cpuinfo', 'model name')}, {_count_cpus()} usable{', virtual machine' * _is_virtual()}",
        "memory": f"{int(_find_in('/proc/meminfo', 'MemTotal').split()[0]) / 2**20:.1f} GiB",
        "load at the start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "Python": f"{platform.python_version()} {platform.python_implementation()}, {' '.join(platform.libc_ver())}",
        "packages": ", ".join(f"{name} {_version_of(name)}" for name in _PACKAGES),
        "commit": _find_commit(),
        "C compiler": _version_of_compiler(),
        "limits": f"{resource.getrlimit(resource.RLIMIT_NOFILE)[1]:,} descriptors, {_read('/proc/sys/kernel/pid_max')} pids",
        "switch interval": f"{sys.getswitchinterval() * 1000:g} ms",
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:  # not there on this kernel, or hidden by a sandbox
        return "unknown"


def _find_in(path: str, key: str) -> str:
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "0 unknown"


def _count_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _is_virtual() -> bool:
    return "hypervisor" in _find_in("/proc/cpuinfo", "flags").split()


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _first_line(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):  # no such program, or not a git clone
        return "unknown"
    return result.stdout.partition("\n")[0].strip()


def _find_commit() -> str:
    return _first_line(["git", "describe", "--always", "--dirty", "--abbrev=12"])


def _version_of_compiler() -> str:
    compiler = find_compiler()
    return _first_line([compiler, "--version"]) if compiler else "missing"
