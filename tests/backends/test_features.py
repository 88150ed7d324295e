"""features(): it tries each call, and the backend follows from the answers."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aiopidfd._backends.backend import probe_pidfd
from aiopidfd._backends.features import features
from aiopidfd._kernel import syscalls

FORBIDDEN = [errno.ENOSYS, errno.EPERM, errno.EACCES]


def failing(code: int) -> Callable[..., Any]:
    """A call that a kernel or a seccomp filter answers with `code`."""

    def fail(*args: object, **keywords: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def name(code: int) -> str:
    return errno.errorcode[code]


def test_answers_are_what_the_calls_answer_here() -> None:
    found = features()
    answer = "yes"
    try:
        os.close(syscalls.open_pidfd(os.getpid()))
    except OSError as exc:
        answer = name(exc.errno or 0)
    assert found.pidfd_open == answer
    assert (found.recover_exit == "yes") is syscalls.can_recover_exit()
    assert found.kernel == os.uname().release
    assert (found.nofile, found.nofile_max) == resource.getrlimit(resource.RLIMIT_NOFILE)
    assert (found.backend == "pidfd") is (probe_pidfd() is None)


needs_pidfds = pytest.mark.skipif(features().pidfd_open != "yes", reason="pidfds are forbidden here")


def test_features_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        features().backend = "sigchld"  # type: ignore[misc] # what the test is about


@pytest.mark.parametrize("code", FORBIDDEN, ids=name)
def test_refused_pidfd_open_forbids_pidfds(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(syscalls, "open_pidfd", failing(code))
    found = features()
    assert (found.pidfd_open, found.backend) == (name(code), "sigchld")
    assert found.reason.startswith(f"pidfd_open answers {name(code)}")
    error = probe_pidfd()
    assert error is not None
    assert error.errno == code


@needs_pidfds
@pytest.mark.parametrize("code", [*FORBIDDEN, errno.EINVAL], ids=name)
def test_refused_waitid_forbids_pidfds(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(syscalls, "wait_id", failing(code))
    found = features()
    assert (found.waitid_pidfd, found.backend) == (name(code), "sigchld")
    assert found.reason.startswith(f"waitid(P_PIDFD) answers {name(code)}")
    error = probe_pidfd()
    assert error is not None
    assert error.errno == code


@pytest.mark.parametrize("code", FORBIDDEN, ids=name)
def test_refused_signals_forbid_pidfds(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """If a child cannot be signalled by pidfd, it is watched by pid, and signalled safely by pid."""
    monkeypatch.setattr(syscalls, "send_signal", failing(code))
    found = features()
    assert (found.pidfd_send_signal, found.backend) == (name(code), "sigchld")


@needs_pidfds
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE], ids=name)
def test_shortage_of_descriptors_does_not_forbid_pidfds(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    before = features()
    monkeypatch.setattr(syscalls, "open_pidfd", failing(code))
    found = features()
    assert found.pidfd_open == name(code)
    # The other calls are tried without a pidfd, too.
    assert (found.waitid_pidfd, found.pidfd_send_signal) == (before.waitid_pidfd, before.pidfd_send_signal)
    assert found.backend == ("pidfd" if before.waitid_pidfd == "yes" else "sigchld")


@needs_pidfds
def test_process_at_its_descriptor_limit_gets_an_answer() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        found = features()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (found.pidfd_open, found.nofile) == ("EMFILE", 0)


@pytest.mark.parametrize(("code", "answer"), [(errno.ENOTTY, "ENOTTY"), (errno.EINVAL, "EINVAL"), (None, "no")])
def test_older_kernel_says_why_a_status_is_lost(monkeypatch: pytest.MonkeyPatch, code: int | None, answer: str) -> None:
    monkeypatch.setattr(syscalls, "can_recover_exit", lambda: False)
    monkeypatch.setattr(syscalls, "get_exit", failing(code) if code else lambda pidfd: None)
    assert features().recover_exit == answer


@pytest.fixture
def set_sigchld_in_c() -> Iterator[Callable[[int | None], None]]:
    """Set the handler of SIGCHLD as a C library does, without Python."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    yield lambda action: libc.signal(signal.SIGCHLD, action)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("action", "answer"),
    [(signal.SIG_DFL, "SIG_DFL"), (signal.SIG_IGN, "SIG_IGN"), (lambda number, frame: None, "a handler in ")],
    ids=["default", "ignored", "handler"],
)
def test_sigchld_is_what_python_has_set(action: Any, answer: str) -> None:
    signal.signal(signal.SIGCHLD, action)
    try:
        assert features().sigchld.startswith(answer)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def test_sigchld_is_what_c_code_has_set_behind_python(set_sigchld_in_c: Callable[[int | None], None]) -> None:
    harmless = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p).value  # it takes an int, as a handler
    set_sigchld_in_c(harmless)
    assert re.search(r"/(libc|ld-musl)", features().sigchld)
    set_sigchld_in_c(signal.SIG_IGN)
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    assert features().sigchld == "SIG_IGN"


def test_trying_raises_no_sigchld() -> None:
    caught: list[int] = []
    signal.signal(signal.SIGCHLD, lambda number, frame: caught.append(number))
    try:
        features()
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    assert caught == []
