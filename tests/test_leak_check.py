"""The check that fails a test which leaves something behind: every other test rests on it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aiopidfd._kernel import syscalls
from aiopidfd._kernel.reaper import Reaper

from . import conftest
from .helpers.children import one_held

_LEFT = """
import ctypes, os
import pytest
from tests import conftest

conftest.lists_children = {lists_children}
wait_here, until_the_end = os.pipe()

def test_zombie():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

def test_child_that_lives():
    if os.fork() == 0:
        os.close(until_the_end)
        os.read(wait_here, 1)
        os._exit(0)

def test_descriptor():
    os.dup(0)

def test_nothing():
    os.close(os.dup(0))
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {{}}), 0)
"""


def needs_listing(lists: bool) -> None:
    if lists and not conftest.lists_children:
        pytest.skip("this kernel does not list children (CONFIG_PROC_CHILDREN)")


@pytest.mark.parametrize("lists", [True, False])
def test_test_that_leaves_something_fails(lists: bool, tmp_path: Path) -> None:
    needs_listing(lists)
    (tmp_path / "test_left.py").write_text(_LEFT.format(lists_children=lists), encoding="utf-8")
    root = Path(__file__).parent.parent
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(root)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=60)
    failed = [line.partition("::")[2].partition(" ")[0] for line in done.stdout.splitlines() if line.startswith("ERROR ")]
    assert failed == ["test_zombie", "test_child_that_lives", "test_descriptor"], done.stdout + done.stderr
    # The summary at the end has them, too, where CI is set.
    reasons = [line for line in done.stdout.splitlines() if line.startswith("E ")]
    assert sum("AssertionError: children left" in line for line in reasons) == 2, done.stdout
    assert "4 passed, 3 errors" in done.stdout


@pytest.mark.parametrize("lists", [True, False])
def test_every_kind_of_child_is_seen(lists: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_listing(lists)
    monkeypatch.setattr(conftest, "lists_children", lists)
    assert conftest.children() == set()
    with one_held() as alive, one_held() as zombie:
        zombie.end_unreaped(0)
        made: list[int] = []
        thread = threading.Thread(target=lambda: made.append(os.posix_spawn("/bin/true", ["true"], {})))
        thread.start()
        thread.join()
        assert conftest.children() == {alive.pid, zombie.pid, *made}
        os.waitpid(made[0], 0)
    assert conftest.children() == set()


@pytest.mark.parametrize("lists", [True, False])
def test_child_without_an_exit_signal_is_seen(lists: bool, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    needs_listing(lists)
    monkeypatch.setattr(conftest, "lists_children", lists)
    reaper, made = Reaper(), syscalls.new_child()
    syscalls.fork_child(made, reaper.fd, 1, lambda gate, mask: os._exit(0), None)
    pid = made.pid
    os.close(made.pidfd)
    syscalls.close_gate(made)
    reaper.close()
    assert conftest.children() == {pid}
    syscalls.wait_id(syscalls.P_PID, pid, os.WEXITED)
    assert conftest.children() == set()
