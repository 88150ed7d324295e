"""A replacement of subprocess.Popen, or of a part of it, sees every program that is started."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from aiopidfd._programs import spawn
from aiopidfd._programs.popen import is_popen_unmodified

from ..conftest import open_descriptors
from ..helpers.subprocesses import (
    PIPE,
    is_ours,
    plug,  # noqa: F401 - pytest looks for it in this module
    pytest_generate_tests,  # noqa: F401 - pytest looks for it in this module
    talk,
)

# Each test runs on loops of our classes, and on other loops with a watcher: see `plug`.
pytestmark = pytest.mark.usefixtures("plug")

Popen = subprocess.Popen
Seen = list[Any]


class Proxy:
    """A proxy as that of wrapt: it has the attributes of the wrapped function, but is no function."""

    __slots__ = ("__wrapped__", "_seen")  # no __dict__ of its own: it shows that of the wrapped function

    def __init__(self, wrapped: Any, seen: Seen) -> None:
        self.__wrapped__, self._seen = wrapped, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return functools.partial(self, instance)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self._seen.append(args)
        return self.__wrapped__(*args, **keywords)

    @property  # type: ignore[misc] # as wrapt does
    def __class__(self) -> Any:
        return type(self.__wrapped__)


def replace_by_function(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    def popen(*args: Any, **keywords: Any) -> Any:
        seen.append(args)
        return Popen(*args, **keywords)

    monkeypatch.setattr(subprocess, "Popen", popen)


def replace_by_mock(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    replace_by_function(monkeypatch, seen)
    monkeypatch.setattr(subprocess, "Popen", mock.Mock(side_effect=subprocess.Popen))


def replace_by_proxy(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    monkeypatch.setattr(subprocess, "Popen", Proxy(Popen, seen))


def replace_by_subclass(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    class Sub(Popen[bytes]):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            seen.append(args)
            super().__init__(*args, **keywords)

    monkeypatch.setattr(subprocess, "Popen", Sub)


def wrap_method(name: str, monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    method = getattr(Popen, name)

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **keywords: Any) -> Any:
        seen.append(args)
        return method(self, *args, **keywords)

    monkeypatch.setattr(Popen, name, wrapped)


def wrap_method_by_proxy(name: str, monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    monkeypatch.setattr(Popen, name, Proxy(getattr(Popen, name), seen))


def wrap_method_by_mock(name: str, monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    wrap_method(name, monkeypatch, seen)
    monkeypatch.setattr(Popen, name, mock.create_autospec(getattr(Popen, name), side_effect=getattr(Popen, name)))


def replace_code(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    """As some tracers do, so that existing references to the function are traced: the old code moves to a new function."""
    init: Any = Popen.__init__
    inner = type(init)(init.__code__, init.__globals__, init.__name__, init.__defaults__, init.__closure__)
    inner.__kwdefaults__ = init.__kwdefaults__

    def outer(self, *args, __kept=(inner, seen), **keywords):  # type: ignore[no-untyped-def]
        __kept[1].append(args)
        return __kept[0](self, *args, **keywords)

    monkeypatch.setattr(init, "__code__", outer.__code__.replace(co_filename=init.__code__.co_filename))
    monkeypatch.setattr(init, "__kwdefaults__", outer.__kwdefaults__)
    monkeypatch.setattr(init, "__defaults__", outer.__defaults__)
    monkeypatch.setattr(init, "__wrapped_by_tracer__", inner, raising=False)


def replace_fork(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    namespace: Any = vars(subprocess)
    where, name = (subprocess, "_fork_exec") if "_fork_exec" in namespace else (namespace["_posixsubprocess"], "fork_exec")
    fork = getattr(where, name)

    def fork_exec(*args: Any) -> int:
        seen.append(args)
        return int(fork(*args))

    monkeypatch.setattr(where, name, fork_exec)


REPLACEMENTS: list[Any] = [
    replace_by_function,
    replace_by_mock,
    replace_by_proxy,
    replace_by_subclass,
    replace_code,
    replace_fork,
    *(
        pytest.param(functools.partial(wrap, name), id=f"{wrap.__name__}-{name}")
        for wrap in (wrap_method, wrap_method_by_proxy, wrap_method_by_mock)
        for name in ("__init__", "_execute_child")
    ),
]


@pytest.mark.parametrize("replace", REPLACEMENTS)
async def test_replaced_popen_starts_each_program(
    replace: Callable[[pytest.MonkeyPatch, Seen], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Seen = []
    with monkeypatch.context() as patch:
        replace(patch, seen)
        assert not is_popen_unmodified()
        process = await asyncio.create_subprocess_exec("/bin/sh", "-c", "cat; exit 3", stdin=PIPE, stdout=PIPE, cwd="/")
        assert is_ours(process)
        assert await talk(process, b"x") == (b"x", None)
        shell = await asyncio.create_subprocess_shell("exit 4", cwd="/")  # without cwd, Popen may use posix_spawn()
        assert (process.returncode, await shell.wait()) == (3, 4)
    assert len(seen) == 2
    assert is_popen_unmodified()
    assert await (await asyncio.create_subprocess_exec("/bin/true")).wait() == 0
    assert len(seen) == 2


async def test_popen_is_unmodified_by_default(backend: str) -> None:
    assert is_popen_unmodified()
    process = await asyncio.create_subprocess_exec("/bin/true")
    popen = process._transport.get_extra_info("subprocess")  # type: ignore[attr-defined] # there is no public way
    assert isinstance(popen, subprocess.Popen)
    if backend == "pidfd":
        assert type(popen) is spawn._Process
    await process.wait()


async def test_it_is_called_as_asyncio_calls_it() -> None:
    calls = []
    plain = asyncio.SelectorEventLoop()
    try:
        for loop in (plain, asyncio.get_running_loop()):
            with mock.patch("subprocess.Popen", side_effect=ZeroDivisionError) as popen:
                creation: Any = loop.subprocess_exec(asyncio.SubprocessProtocol, "program", "-x", stdin=None, cwd="/")
                if loop is plain:
                    creation = asyncio.get_running_loop().run_in_executor(None, plain.run_until_complete, creation)
                with pytest.raises(ZeroDivisionError):
                    await creation
            calls.append(popen.call_args)
    finally:
        plain.close()
    assert calls[0] == calls[1]


async def test_error_of_a_replaced_popen_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    await (await asyncio.create_subprocess_exec("/bin/true")).wait()
    before = open_descriptors()
    with mock.patch("subprocess.Popen", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        await asyncio.create_subprocess_exec("/bin/true", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    assert open_descriptors() == before


class FakePopen:
    """A test double: it has no process, and a pid that no process has."""

    def __init__(self, args: Any, **keywords: Any) -> None:
        self.args, self.keywords = args, keywords
        self.pid = 0x3FFFFF  # above the default limit of pids
        self.stdin = self.stdout = self.stderr = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode


@pytest.mark.parametrize(("returncode", "expected"), [(None, 255), (7, 7)])
async def test_popen_without_a_process_has_its_own_returncode_or_a_lost_one(
    returncode: int | None, expected: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on asyncio's loops, which call waitpid() for a pid that is no child."""
    monkeypatch.setattr(FakePopen, "returncode", returncode, raising=False)

    class Ended(FakePopen):
        def __init__(self, args: Any, **keywords: Any) -> None:
            super().__init__(args, **keywords)
            self.returncode = returncode

    monkeypatch.setattr(subprocess, "Popen", Ended)
    process = await asyncio.create_subprocess_exec("/no/such/program")
    assert process.pid == 0x3FFFFF
    assert await process.wait() == expected
    assert bool(caplog.messages) is (returncode is None)


BEFORE = """
import asyncio, functools, subprocess, sys, unittest.mock
real, seen = subprocess.Popen, []
{replace}
import aiopidfd
async def main():
    process = await asyncio.create_subprocess_exec("/bin/sh", "-c", "exit 3", stdout=subprocess.PIPE)
    await process.communicate()
    print(process.returncode, len(seen))
    {restore}
    process = await asyncio.create_subprocess_exec("/bin/sh", "-c", "exit 4", stdout=subprocess.PIPE)
    await process.communicate()
    print(process.returncode, len(seen), isinstance(process._transport.get_extra_info("subprocess"), real))
aiopidfd.run(main(), loop_factory=aiopidfd.SelectorEventLoop)
from aiopidfd._programs import spawn
print("in C" if spawn._clone_errno == 0 else "by Popen")
"""

BEFORE_IMPORT = {
    "a function": ("def popen(*a, **k):\n    seen.append(a)\n    return real(*a, **k)\nsubprocess.Popen = popen", "Popen"),
    "a partial": (
        "def popen(*a, **k):\n    seen.append(a)\n    return real(*a, **k)\nsubprocess.Popen = functools.partial(popen)",
        "Popen",
    ),
    "a mock": (
        "def popen(*a, **k):\n    seen.append(a)\n    return real(*a, **k)\n"
        "subprocess.Popen = unittest.mock.MagicMock(side_effect=popen)",
        "Popen",
    ),
    "a subclass": (
        "class Sub(real):\n    def __init__(self, *a, **k):\n        seen.append(a)\n        super().__init__(*a, **k)\n"
        "subprocess.Popen = Sub",
        "Popen",
    ),
    "a method": (
        "init = real.__init__\ndef wrapped(self, *a, **k):\n    seen.append(a)\n    init(self, *a, **k)\n"
        "real.__init__ = wrapped",
        "init",
    ),
}


@pytest.mark.parametrize("replacement", BEFORE_IMPORT)
def test_what_was_replaced_before_our_import_counts_and_so_does_what_was_put_back(replacement: str) -> None:
    replace, what = BEFORE_IMPORT[replacement]
    restore = "subprocess.Popen = real" if what == "Popen" else "real.__init__ = init"
    program = BEFORE.format(replace=replace, restore=restore)
    environment = {**os.environ, "AIOPIDFD_BACKEND": "auto"}
    result = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60, env=environment
    )
    assert result.stdout.startswith("3 1\n4 1 True\n"), result.stdout + result.stderr
