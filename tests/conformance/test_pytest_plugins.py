"""pytest-asyncio and anyio's plugin run tests and fixtures on our loops, with code as users write it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import LOOPS

CLASSES = {"asyncio": "SelectorEventLoop", "uvloop": "UvloopEventLoop"}

# A fork server belongs to one loop, so this shows that fixture and test have the same loop.
TEST = """
import asyncio
import aiopidfd
import pytest
{imports}

@{fixture}
async def server():
    async with aiopidfd.ForkServer(fallback=True) as server:
        yield server

def add(first, second):
    return first + second

@{mark}
async def test_children(server):
    assert type(asyncio.get_running_loop()) is aiopidfd.{loop_class}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec("sh", "-c", "cat; exit 3", stdin=pipe, stdout=pipe)
    assert await process.communicate(b"data") == (b"data", None)
    assert process.returncode == 3
    child = await aiopidfd.afork(lambda: 4)
    assert await child.wait() == 4
    worker = await server.afork(add, 2, 3)
    assert await worker.wait() == 5
"""

HOOK = """
import aiopidfd

def pytest_asyncio_loop_factories(config, item):
    return {{"aiopidfd": aiopidfd.{loop_class}}}
"""

POLICY = """
import aiopidfd
import pytest

@pytest.fixture
def event_loop_policy():
    return aiopidfd.EventLoopPolicy(aiopidfd.{loop_class})
"""

ANYIO = """
import aiopidfd
import pytest

@pytest.fixture
def anyio_backend():
    return "asyncio", {{"loop_factory": aiopidfd.{loop_class}}}
"""


def run_pytest(folder: Path, conftest: str, test: str, *options: str) -> None:
    """Run a test in a new pytest process. It must pass."""
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_children.py").write_text(test)
    (folder / "pytest.ini").write_text("[pytest]\n")  # makes the folder the root
    command = [sys.executable, "-W", "error", "-m", "pytest", "-p", "no:cacheprovider", *options, str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("loop", LOOPS)
def test_pytest_asyncio_runs_on_our_loop(loop: str, tmp_path: Path) -> None:
    plugin = pytest.importorskip("pytest_asyncio.plugin", reason="pytest-asyncio is not installed")
    has_hook = hasattr(getattr(plugin, "PytestAsyncioSpecs", None), "pytest_asyncio_loop_factories")  # since 1.4
    names = {"imports": "import pytest_asyncio", "fixture": "pytest_asyncio.fixture", "mark": "pytest.mark.asyncio"}
    test = TEST.format(loop_class=CLASSES[loop], **names)
    conftest = (HOOK if has_hook else POLICY).format(loop_class=CLASSES[loop])
    run_pytest(tmp_path, conftest, test, "-o", "asyncio_default_fixture_loop_scope=function")


@pytest.mark.parametrize("loop", LOOPS)
def test_plugin_of_anyio_runs_on_our_loop(loop: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("anyio") is None:
        pytest.skip("anyio is not installed")
    test = TEST.format(loop_class=CLASSES[loop], imports="", fixture="pytest.fixture", mark="pytest.mark.anyio")
    run_pytest(tmp_path, ANYIO.format(loop_class=CLASSES[loop]), test, "-p", "no:asyncio")
