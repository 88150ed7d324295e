"""Real seccomp filters, in place of old kernels and strict sandboxes: some system calls fail in a command or this process.

The rules are those of nopidfd.c, as in "pidfd_open=EPERM,waitid_pidfd=EPERM"; an errno is ENOSYS if it is not named.
By hand, for the whole suite:

    cc -iquote cffi_build -o /tmp/nopidfd tests/helpers/nopidfd.c
    /tmp/nopidfd pidfd_open,waitid_pidfd,pidfd_send_signal,clone3 python -m pytest
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

# Set in a process under a filter: tests that run the suite under a filter are skipped inside it.
NESTED = "AIOPIDFD_TESTS_UNDER_FILTER"

# pidfds cannot be had at all. clone3 is refused with ENOSYS by both: after any other error glibc (since 2.34) does not try
# clone, so that no program under such a filter can start a thread, or use posix_spawn.
NO_PIDFDS = {
    "ENOSYS": "pidfd_open,waitid_pidfd,pidfd_send_signal,clone3",
    "EPERM": "pidfd_open=EPERM,waitid_pidfd=EPERM,pidfd_send_signal=EPERM,clone3",
}

_SOURCES = Path(__file__).parent


@functools.cache
def _directory() -> Path:
    """A directory for compiled files. This process removes it at its end; its forked children do not."""
    path, pid = Path(tempfile.mkdtemp(prefix="aiopidfd-tests-")), os.getpid()

    def remove() -> None:
        if os.getpid() == pid:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path


@functools.cache
def compile_c(source: str, *options: str) -> Path:
    """Compile a C file of the tests, once per process. Return the result. Skip the test if there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    made = _directory() / f"{Path(source).stem}{'.so' if '-shared' in options else ''}"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-iquote", str(_SOURCES.parents[1] / "cffi_build")]
    command = [compiler, *flags, *options, "-o", str(made), str(_SOURCES / source)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if "unsupported architecture" in result.stderr:
        pytest.skip(f"{source} does not know this architecture: {os.uname().machine}")
    assert result.returncode == 0, result.stderr
    return made


def under_filter(rules: str, command: list[str], **popen: Any) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end with the calls in `rules` refused; return it with its output.

    The output is captured, as text, if `popen` does not say otherwise; it takes whatever subprocess.run does.
    The test is skipped, and says why, where no filter can be made.
    """
    environment = {**(popen.pop("env", None) or os.environ), NESTED: rules}
    if not {"stdout", "stderr", "capture_output"} & popen.keys():
        popen["capture_output"] = True
    popen.setdefault("text", True)
    result = subprocess.run([str(compile_c("nopidfd.c")), rules, *command], check=False, env=environment, **popen)
    if result.returncode == 2 and result.stderr and result.stderr.startswith("nopidfd: "):
        if "Invalid argument" in result.stderr:
            raise ValueError(result.stderr)
        pytest.skip(f"no filter can be installed here: {result.stderr.strip()}")
    return result


def python_under_filter(rules: str, program: str, *options: str, **popen: Any) -> str:
    """Run a Python program under a filter. Return what it prints. Fail, with its errors, if it fails."""
    result = under_filter(rules, [sys.executable, *options, "-c", program], timeout=60, **popen)
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"
    return str(result.stdout)


def installing(rules: str) -> str:
    """A Python statement that installs a filter for the thread that runs it, and for its children."""
    library = compile_c("nopidfd.c", "-shared", "-fPIC")
    return f"import ctypes; assert ctypes.CDLL({str(library)!r}).ap_install_filter({rules.encode()!r}) == 0"
