"""Signal handlers in a forked child: those of Python code and of loops are reset, those of C libraries stay."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from aiopidfd import afork

from ..conftest import BACKENDS, LOOPS
from ..helpers.seccomp import compile_c
from .test_child import ask, bit, signal_masks

FAULTS = [signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS]

# A worker that crashes, or that is asked where it is, in each way that there is to make one.
_PROGRAM = """
import asyncio, faulthandler, os, signal, sys
import aiopidfd
what = os.environ["WHAT"]
if what == "register":
    faulthandler.register(signal.SIGUSR1)

def crash():
    faulthandler._sigsegv()

def register():
    os.kill(os.getpid(), signal.SIGUSR1)
    return 5

child_func = register if what == "register" else crash

async def main():
    if how == "afork":
        return await (await aiopidfd.afork(child_func)).wait()
    async with aiopidfd.ForkServer(start_method=how, preload=["__main__"]) as server:
        return await (await server.afork(child_func)).wait()

if __name__ == "__main__":
    how, loop_kind = sys.argv[1:]
    factory = aiopidfd.UvloopEventLoop if loop_kind == "uvloop" else aiopidfd.SelectorEventLoop
    print(aiopidfd.run(main(), loop_factory=factory))
"""

MAKERS = ["afork", *(["fork", "spawn"] if "pidfd" in BACKENDS else [])]


def run_worker(tmp_path: Any, how: str, kind: str, what: str, *options: str, **environment: str) -> tuple[str, str]:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    without = {name: value for name, value in os.environ.items() if name not in ("PYTHONDEVMODE", "PYTHONFAULTHANDLER")}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", *options, str(program), how, kind],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**without, **environment, "WHAT": what},
    )
    return ran.stdout, ran.stderr


@pytest.mark.parametrize("how", MAKERS)
@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("enabled_by", ["-X", "PYTHONFAULTHANDLER"])
def test_worker_that_crashes_prints_its_traceback(tmp_path: Any, kind: str, how: str, enabled_by: str) -> None:
    if enabled_by == "-X":
        stdout, stderr = run_worker(tmp_path, how, kind, "crash", "-X", "dev")
    else:
        stdout, stderr = run_worker(tmp_path, how, kind, "crash", PYTHONFAULTHANDLER="1")
    assert stdout == f"{-signal.SIGSEGV}\n"
    assert "Fatal Python error: Segmentation fault" in stderr
    assert "in crash" in stderr


@pytest.mark.parametrize("how", MAKERS)
@pytest.mark.parametrize("kind", LOOPS)
def test_worker_prints_where_it_is_when_asked(tmp_path: Any, kind: str, how: str) -> None:
    stdout, stderr = run_worker(tmp_path, how, kind, "register")
    assert stdout == "5\n"
    assert "in register" in stderr


def test_worker_that_crashes_under_pytest_prints_its_traceback(tmp_path: Any) -> None:
    (tmp_path / "test_it.py").write_text(
        "import aiopidfd, faulthandler\n"
        "def crash(): faulthandler._sigsegv()\n"
        "async def main(): return await (await aiopidfd.afork(crash)).wait()\n"
        "def test_it(): assert aiopidfd.run(main()) == -11\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "test_it.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout
    assert "Fatal Python error: Segmentation fault" in ran.stderr


@pytest.fixture
def library() -> Any:
    return ctypes.CDLL(str(compile_c("library.c", "-O1", "-shared", "-fPIC", "-pthread")))


@pytest.fixture
def restored() -> Any:
    """Handlers of C libraries go with the test."""
    numbers = [*FAULTS, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGWINCH]
    pythons = {number: signal.getsignal(number) for number in numbers}
    is_enabled = faulthandler.is_enabled()  # by pytest, whose plugin enables it for each test's own output
    faulthandler.disable()
    yield
    for number, handler in pythons.items():
        signal.signal(number, handler or signal.SIG_DFL)  # None: faulthandler was enabled before Python looked
    if is_enabled:
        faulthandler.enable(2)


async def test_handlers_of_c_libraries_stay(library: Any, restored: None) -> None:
    numbers = [*FAULTS, signal.SIGUSR2, signal.SIGCHLD, 40, 64]
    for number in numbers:
        assert library.handle(number, 0) == 0
    try:
        masks = await ask(signal_masks)
    finally:
        for number in (40, 64):
            signal.signal(number, signal.SIG_DFL)
    for number in numbers:
        assert masks["SigCgt"] & bit(number), number


async def test_python_handlers_of_faults_are_reset(restored: None) -> None:
    for number in FAULTS:
        signal.signal(number, lambda *_: None)
    masks = await ask(signal_masks)
    for number in FAULTS:
        assert not masks["SigCgt"] & bit(number), number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
async def test_python_handler_behind_that_of_a_c_library_is_the_default(
    number: signal.Signals, library: Any, restored: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """The C handler runs, and calls Python's: which does what the default does, and not what the parent would."""
    signal.signal(number, lambda *_: os.write(2, b"the parent's"))
    assert library.handle(number, 1) == 0

    def child() -> int:
        os.kill(os.getpid(), number)
        for _ in range(100):  # Python's handlers run between two steps
            pass
        return 8

    assert await (await afork(child)).wait() == -number
    assert capfd.readouterr().err == "."
    os.kill(os.getpid(), number)  # the parent's own is as it was
    await asyncio.sleep(0)
    assert capfd.readouterr().err == ".the parent's"


async def test_python_handler_of_what_is_ignored_by_default_is_behind_that_of_a_c_library(
    library: Any, restored: None, capfd: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGWINCH, lambda *_: os.write(2, b"the parent's"))
    assert library.handle(signal.SIGWINCH, 1) == 0

    def child() -> int:
        os.kill(os.getpid(), signal.SIGWINCH)
        os.kill(os.getpid(), signal.SIGWINCH)
        return 7

    assert await (await afork(child)).wait() == 7
    assert capfd.readouterr().err == ".."


async def test_keyboard_interrupt_comes_by_way_of_a_c_library_that_handles_sigint(
    library: Any, restored: None, capfd: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGINT, lambda *_: None)
    assert library.handle(signal.SIGINT, 1) == 0

    def child() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(100):
                pass
        except KeyboardInterrupt:
            return 9
        return 1

    assert await (await afork(child)).wait() == 9
    assert capfd.readouterr().err == "."


async def test_child_that_ignores_sigint_knows_it(restored: None) -> None:
    """asyncio.run looks whether Python has its own handler there, and would handle SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert await ask(lambda: signal.getsignal(signal.SIGINT) == signal.SIG_IGN)


async def test_libuvs_sigchld_handler_is_reset(restored: None) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def look() -> int:
        process = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE)  # uvloop's own way
        assert process.stdin is not None
        assert signal_masks()["SigCgt"] & bit(signal.SIGCHLD)
        child = await afork(lambda: int(signal_masks()["SigCgt"] & bit(signal.SIGCHLD) != 0))
        code = await child.wait()
        process.stdin.close()
        await process.wait()
        return code

    def run_uvloop() -> int:
        loop = uvloop.new_event_loop()
        try:
            code: int = loop.run_until_complete(look())
            return code
        finally:
            loop.close()

    child = await afork(run_uvloop)  # libuv's handler is the process's, and stays until its last child has ended
    assert await child.wait() == 0
