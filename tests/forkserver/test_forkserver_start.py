"""How a fork server starts: preloaded modules, the main module, its interpreter, and where it cannot be."""

from __future__ import annotations

import errno
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aiopidfd import ChildStartError, ForkServer, PosixChildProcess
from aiopidfd._backends.backend import probe_pidfd
from aiopidfd._fork import afork
from aiopidfd._forkserver import pickling
from aiopidfd._kernel import syscalls

from ..conftest import children
from ..helpers.children import undebugged_environment
from ..helpers.workers import ask, exit_with

needs_pidfds = pytest.mark.skipif(probe_pidfd() is not None, reason="pidfds are forbidden here, and so is a fork server")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_modules_are_preloaded(pidfds: None, method: Any) -> None:
    sys.modules.pop("bench.forked", None)
    async with ForkServer(preload=["tests.helpers.children", "bench.forked"], start_method=method) as server:
        assert await ask(server, "bench")


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_module_that_cannot_be_preloaded_is_an_error(pidfds: None, method: Any) -> None:
    with pytest.raises(ChildStartError, match="No module named 'no_such_module'"):
        async with ForkServer(preload=["no_such_module"], start_method=method):
            pass


async def test_preloaded_module_that_starts_threads_is_an_error(pidfds: None, tmp_path: Path) -> None:
    tmp_path.joinpath("with_thread.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n", encoding="utf-8"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ChildStartError, match="has started threads"):
            async with ForkServer(preload=["with_thread"]):
                pass
    finally:
        sys.path.remove(str(tmp_path))


MAIN = """
import asyncio, aiopidfd, pickle, sys

def work(code):
    return code

async def main():
    sys.modules["cloudpickle"] = None
    async with aiopidfd.ForkServer(start_method=sys.argv[1], preload=sys.argv[2:]) as server:
        try:
            print(await (await server.afork(work, 5)).wait())
        except pickle.PicklingError as exc:
            print(exc)

if __name__ == "__main__":
    asyncio.run(main())
"""


@needs_pidfds
@pytest.mark.parametrize(
    ("arguments", "output"), [(["fork"], "5\n"), (["spawn", "__main__"], "5\n"), (["spawn"], "preload '__main__'")]
)
def test_functions_of_the_main_module(tmp_path: Path, arguments: list[str], output: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(MAIN, encoding="utf-8")
    command, environment = [sys.executable, str(program), *arguments], undebugged_environment()
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert output in ran.stdout


def test_main_is_found_only_where_it_is_looked_up() -> None:
    assert not pickling._refers_to_main(pickle.dumps(exit_with))
    assert not pickling._refers_to_main(pickle.dumps("in __main__ there is"))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("where", ["parent", "server"])
async def test_where_clone_is_refused_there_is_a_clear_error_or_the_fallback(
    pidfds: None, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    def refuse(*args: Any) -> Any:
        raise syscalls.error(code, "clone(CLONE_PIDFD)")

    if where == "parent":
        monkeypatch.setattr(afork, "clone", refuse)
    else:
        monkeypatch.setattr(syscalls, "fork_sibling", refuse)
    before = children()
    with pytest.raises(OSError, match="clone") as caught:
        async with ForkServer():
            pass
    assert caught.value.errno == code
    assert children() == before
    async with ForkServer(fallback=True) as server:
        assert server.features.made_by == "none"
        assert "clone" in server.features.reason
        assert server.pid is None
        assert await (await server.afork(exit_with, 6)).wait() == 6


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM])
async def test_clone_that_fails_for_the_moment_is_no_reason_to_fall_back(
    pidfds: None, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*args: Any) -> Any:
        raise syscalls.error(code, "clone")

    monkeypatch.setattr(afork, "clone", fail)
    with pytest.raises(OSError, match="clone") as caught:
        async with ForkServer(fallback=True):
            pass
    assert caught.value.errno == code


async def test_without_pidfds_there_is_no_fork_server(backend: str) -> None:
    if backend == "pidfd":
        pytest.skip("pidfds can be used")
    with pytest.raises(OSError, match="pidfd") as caught:
        async with ForkServer():
            pass
    assert caught.value.errno in syscalls.FORBIDDEN | {errno.EINVAL}
    async with ForkServer(fallback=True) as server:
        assert server.features.made_by == "none"
        child = await server.afork(exit_with, 8)
        assert isinstance(child, PosixChildProcess)
        assert await child.wait() == 8


async def test_interpreter_that_is_not_known_cannot_be_spawned(pidfds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(RuntimeError, match="executable"):
        async with ForkServer(start_method="spawn"):
            pass


async def test_interpreter_that_ends_at_once_is_a_start_error(pidfds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ChildStartError) as caught:
        async with ForkServer(start_method="spawn"):
            pass
    assert caught.value.exit_status.returncode == 1
