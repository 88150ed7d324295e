"""The loop classes, the policy, and watchers that are attached to other loops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from aiopidfd import PidfdWatcher

from ..conftest import LoopFactory
from ..helpers.children import undebugged_environment
from ..helpers.subprocesses import (
    ANSWER,
    PIPE,
    answer,
    needs_child_watchers,
    needs_uvloop,
    plug,  # noqa: F401 - pytest looks for it in this module
    pytest_generate_tests,  # noqa: F401 - pytest looks for it in this module
    talk,
)

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment] # tests on uvloop are skipped, with a reason


# Each test runs on loops of our classes, and on other loops with a watcher: see `plug`.
pytestmark = pytest.mark.usefixtures("plug")

LOOPS_BY_NAME = """
import asyncio, gc, os, subprocess, sys
import aiopidfd

def make_loop(kind):
    if kind in ("SelectorEventLoop", "UvloopEventLoop"):
        return getattr(aiopidfd, kind)()
    if kind == "uvloop":
        import uvloop
        loop = uvloop.new_event_loop()
    else:
        loop = asyncio.SelectorEventLoop()
    aiopidfd.PidfdWatcher().attach_loop(loop)
    return loop
"""

KINDS = [
    "SelectorEventLoop",
    pytest.param("UvloopEventLoop", marks=needs_uvloop),
    "asyncio",
    pytest.param("uvloop", marks=needs_uvloop),
]


def run_python(script: str, *arguments: str, options: tuple[str, ...] = ("-W", "error")) -> tuple[str, str]:
    """Run a script in a new process, which must succeed. Return its stdout and its stderr."""
    done = subprocess.run(
        [sys.executable, *options, "-c", LOOPS_BY_NAME + textwrap.dedent(script), *arguments],
        env=undebugged_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip(), done.stderr


NOISE = ("Event loop is closed", "Exception ignored", "Traceback", "never retrieved", "ignored GeneratorExit")


def assert_quiet(stderr: str) -> None:
    """ResourceWarnings are expected. Nothing else may be printed."""
    assert not [noise for noise in NOISE if noise in stderr], stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("closed", ["loop", "nothing"])
def test_destructors_are_quiet_when_processes_are_left_behind(kind: str, closed: str) -> None:
    script = """
        async def main():
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            return [await asyncio.create_subprocess_exec("/bin/cat", **pipes) for _ in range(3)]

        loop = make_loop(sys.argv[1])
        processes = loop.run_until_complete(main())
        processes[0].kill()
        processes[1].stdin.write(b"x")
        if sys.argv[2] == "loop":
            loop.close()
        del loop, processes
        gc.collect()
        print("end")
    """
    output, stderr = run_python(script, kind, closed, options=("-X", "dev"))
    assert output == "end"
    assert_quiet(stderr)


ECHO = """
        async def main():
            process = await asyncio.create_subprocess_shell("cat; exit 3", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            print(type(process._transport).__module__, *(await process.communicate(b"x")), process.returncode)
"""
OURS = "aiopidfd._programs.transport b'x' None 3"


@needs_uvloop
def test_our_loop_needs_no_policy_and_cares_for_no_other() -> None:
    script = """
        import warnings
        import uvloop

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        aiopidfd.run(main(), loop_factory=aiopidfd.SelectorEventLoop)
    """
    assert run_python(ECHO + script) == (OURS, "")


FACTORIES = [
    "None",
    "aiopidfd.SelectorEventLoop",
    pytest.param("aiopidfd.UvloopEventLoop", marks=needs_uvloop),
]


@pytest.mark.parametrize("factory", FACTORIES)
def test_policy_makes_loops_of_its_factory(factory: str) -> None:
    script = f"""
        import warnings

        policy = aiopidfd.EventLoopPolicy(loop_factory={factory})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # asyncio's own, of policies, since Python 3.14
            asyncio.set_event_loop_policy(policy)
        asyncio.run(main())
        loop = policy.new_event_loop()
        print(isinstance(loop, {factory} or getattr(aiopidfd, "{"UvloopEventLoop" if uvloop else "SelectorEventLoop"}")))
        loop.close()
    """
    assert run_python(ECHO + script) == (f"{OURS}\nTrue", "")


@needs_child_watchers
@pytest.mark.parametrize(
    "factory",
    [
        *FACTORIES,
        "asyncio.SelectorEventLoop",
        pytest.param("__import__('uvloop').new_event_loop", marks=needs_uvloop),
    ],
)
def test_policy_has_child_watchers_on_every_loop(factory: str) -> None:
    script = f"""
        import warnings

        warnings.filterwarnings("ignore", message=".*child_watcher", category=DeprecationWarning)  # asyncio's, since 3.12
        asyncio.set_event_loop_policy(aiopidfd.EventLoopPolicy(loop_factory={factory}))
        assert isinstance(asyncio.get_child_watcher(), aiopidfd.PidfdWatcher)
        first, second = aiopidfd.PidfdWatcher(), aiopidfd.PidfdWatcher()
        asyncio.set_child_watcher(first)
        assert asyncio.get_child_watcher() is first
        asyncio.set_child_watcher(second)
        assert asyncio.get_child_watcher() is second
        assert "closed" in repr(first)
        asyncio.run(main())
        asyncio.set_child_watcher(None)
        assert "closed" in repr(second)
        asyncio.run(main())
    """
    outputs, stderr = run_python(ECHO + script)
    assert stderr == ""
    first, second = outputs.splitlines()
    assert first == OURS
    # Without a watcher, loops of other classes do what they always do.
    assert second == OURS or "(" in factory or factory == "asyncio.SelectorEventLoop"
    assert second.endswith("b'x' None 3")


def test_import_of_every_public_name_warns_of_nothing() -> None:
    script = """
        for name in aiopidfd.__all__:
            if name != "UvloopEventLoop":
                getattr(aiopidfd, name)
    """
    assert run_python(script) == ("", "")


@needs_uvloop
def test_uvloop_is_imported_only_when_its_loop_is_asked_for() -> None:
    script = """
        assert "uvloop" not in sys.modules
        loop = aiopidfd.UvloopEventLoop()
        import uvloop

        assert isinstance(loop, uvloop.Loop)
        assert aiopidfd.UvloopEventLoop is type(loop)
        print(type(loop).__module__, type(loop).__qualname__)
        loop.close()
    """
    assert run_python(script) == ("aiopidfd UvloopEventLoop", "")


def test_without_uvloop_its_loop_names_the_extra_and_the_rest_works() -> None:
    script = """
        sys.modules["uvloop"] = None
        for _ in range(2):
            try:
                from aiopidfd import UvloopEventLoop
            except ImportError as exc:
                print(exc)
        aiopidfd.run(main())
        try:
            aiopidfd.no_such_name
        except AttributeError as exc:
            print(exc)
    """
    message = "UvloopEventLoop needs uvloop: pip install 'aiopidfd[uvloop]'"
    expected = [message, message, OURS, "module 'aiopidfd' has no attribute 'no_such_name'"]
    assert run_python(ECHO + script) == ("\n".join(expected), "")


@pytest.fixture(params=["asyncio", pytest.param("uvloop", marks=needs_uvloop)])
def plain_loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    """A loop of another class."""
    loop = asyncio.SelectorEventLoop() if request.param == "asyncio" else uvloop.Loop()
    yield loop
    loop.close()


def has_native_methods(loop: Any) -> bool:
    return not {"subprocess_exec", "subprocess_shell"} & set(vars(loop))


def test_detaching_gives_the_loop_its_own_methods_back(plain_loop: asyncio.AbstractEventLoop) -> None:
    watcher = PidfdWatcher()
    for detach in (partial(watcher.attach_loop, None), watcher.close):
        watcher.attach_loop(plain_loop)
        assert not has_native_methods(plain_loop)
        assert plain_loop.run_until_complete(answer()) == ANSWER
        detach()
        assert has_native_methods(plain_loop)
    assert plain_loop.run_until_complete(answer()) == (False, "hello\n")


def test_loop_stays_plugged_until_the_last_watcher_has_left(plain_loop: asyncio.AbstractEventLoop) -> None:
    one, other = PidfdWatcher(), PidfdWatcher()
    one.attach_loop(plain_loop)
    one.attach_loop(plain_loop)
    other.attach_loop(plain_loop)
    one.close()
    assert plain_loop.run_until_complete(answer()) == ANSWER
    other.attach_loop(None)
    assert has_native_methods(plain_loop)


def test_watcher_that_was_dropped_stays_plugged_beside_later_ones(plain_loop: asyncio.AbstractEventLoop) -> None:
    """The next watcher may get the same id()."""
    PidfdWatcher().attach_loop(plain_loop)
    for _ in range(5):
        other = PidfdWatcher()
        other.attach_loop(plain_loop)
        other.close()
        del other
    assert plain_loop.run_until_complete(answer()) == ANSWER


def test_watcher_that_moves_to_another_loop_unplugs_the_first(plain_loop: asyncio.AbstractEventLoop) -> None:
    other = asyncio.SelectorEventLoop()
    with contextlib.closing(other):
        watcher = PidfdWatcher()
        watcher.attach_loop(plain_loop)
        watcher.attach_loop(other)
        assert has_native_methods(plain_loop)
        assert other.run_until_complete(answer()) == ANSWER


def test_processes_go_on_when_the_watcher_leaves(plain_loop: asyncio.AbstractEventLoop) -> None:
    watcher = PidfdWatcher()
    watcher.attach_loop(plain_loop)

    async def main() -> tuple[bytes | None, bytes | None]:
        process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE)
        watcher.close()
        return await talk(process, b"still here")

    assert plain_loop.run_until_complete(main()) == (b"still here", None)


def test_plugged_loop_is_freed_when_it_is_dropped(loop_factory: LoopFactory) -> None:
    import weakref

    loop = loop_factory()
    loop.run_until_complete(answer())
    dropped = weakref.ref(loop)
    loop.close()
    del loop
    gc.collect()
    assert dropped() is None


def test_attaching_to_a_loop_of_ours_changes_nothing(loop_class: Any) -> None:
    loop = loop_class()
    watcher = PidfdWatcher()
    with contextlib.closing(loop):
        watcher.attach_loop(loop)
        assert has_native_methods(loop)
        watcher.close()
        assert loop.run_until_complete(answer()) == ANSWER
