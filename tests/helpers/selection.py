"""Which tests a run includes, and what it says about those that it leaves out.

Most tests run on every combination of loop, backend and way to plug into a loop. `--full` runs all of that. By default a
test that is not of the core runs on one of its combinations. They take turns from test to test, and from one set of other
parameters to the next. So a file sees all of them, and the same test always has the same one. What takes long runs in a
short form (the fixture `full` is false), or not at all (the mark `long`).

Whoever names a test on the command line, as in `tests/test_wait.py::test_name` or `...::test_name[sigchld-uvloop]`, gets it.
"""

from __future__ import annotations

import os
import signal
import threading
import zlib
from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import Any, cast

import pytest

# What stands in a test's id for what it runs on. All other parameters say what it does there.
COMBINED = {
    *("asyncio", "uvloop", "SelectorEventLoop", "UvloopEventLoop"),  # the loop
    *("pidfd", "sigchld"),  # the backend
    *("class", "attached", "ours", "plain"),  # whether the loop is of our class
}
ELSEWHERE = "other Pythons (tests/matrix), kernels (tests/kernels/run), sanitizers (tests/sanitize), bugs (tests/mutants)"

_left_out = pytest.StashKey[dict[str, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run each test on all loops and backends, and all that takes long")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_left_out] = {}
    for line in (
        "core: runs on all loops and backends, also without --full",
        "long: runs with --full only",
        "one_of: a class whose tests are those of other classes in the module, on another kind of loop",
    ):
        config.addinivalue_line("markers", line)
    if hasattr(config, "workerinput"):
        _hide_reader(config)


def _hide_reader(config: pytest.Config) -> None:
    """Let a worker of pytest-xdist pass for a process with one thread: its other one reads from a pipe, and nothing else.

    To aiopidfd it is one of io_uring's by that name. Python 3.12 and newer count it nevertheless, and warn when they fork.
    """
    for thread in os.listdir("/proc/self/task"):
        if int(thread) != os.getpid():
            Path(f"/proc/self/task/{thread}/comm").write_text("iou-wrk-xdist", encoding="ascii")
    config.addinivalue_line("filterwarnings", "ignore:This process:DeprecationWarning")

    # Nor may it take a signal that a test has blocked in the main thread. It blocks all when it handles its first command.
    interactor: Any = next(plugin for plugin in config.pluginmanager.get_plugins() if hasattr(plugin, "handle_command"))
    handle = interactor.handle_command

    def handle_without_signals(command: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        handle(command)

    interactor.handle_command = handle_without_signals


@pytest.fixture
def full(pytestconfig: pytest.Config) -> bool:
    """Whether all is to be run, however long it takes."""
    return bool(pytestconfig.getoption("full"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only --full runs. The last of its kind, so that `-k uvloop` has already chosen what it wants."""
    if config.getoption("full"):
        return
    named = _named(config)
    left_out: dict[str, int] = {"short": 0, "long": 0, "combinations": 0}
    kept: dict[int, pytest.Item] = {}
    groups: dict[Hashable, list[pytest.Function]] = defaultdict(list)
    for item in items:
        left_out["short"] += "full" in getattr(item, "fixturenames", ())
        if any(item.nodeid == name or item.nodeid.startswith((f"{name}[", f"{name}::")) for name in named):
            kept[id(item)] = item
        elif item.get_closest_marker("long"):
            left_out["long"] += 1
        elif item.get_closest_marker("core") or not isinstance(item, pytest.Function):
            kept[id(item)] = item
        else:
            groups[_group(item)].append(item)
    for group in groups.values():
        possible = [item for item in group if not _is_skipped(item)] or group
        chosen = possible[_turn(group[0]) % len(possible)]
        kept[id(chosen)] = chosen
        left_out["combinations"] += len(group) - 1
    left_out["tests"] = len(items)
    config.stash[_left_out] = left_out
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def _named(config: pytest.Config) -> list[str]:
    """Return the node ids on the command line that name more than a file."""
    named = []
    for argument in config.args:
        path, separator, name = argument.partition("::")
        if separator:
            absolute = (config.invocation_params.dir / path).resolve()
            named.append(f"{absolute.relative_to(config.rootpath).as_posix()}::{name}")
    return named


def _other_parameters(item: pytest.Function) -> str:
    """Return the parameters of a test that do not say on what it runs, as they stand in its id."""
    _, _, parameters = item.name.partition("[")
    return "-".join(part for part in parameters.rstrip("]").split("-") if part not in COMBINED)


def _group(item: pytest.Function) -> Hashable:
    """Return what the combinations of one test have in common."""
    cls = None if item.get_closest_marker("one_of") else item.cls
    return item.path, cls, item.originalname, _other_parameters(item)


def _turn(item: pytest.Function) -> int:
    """Return whose turn it is, by the place of the test in its module and by its other parameters, whatever else runs."""
    place = list(vars(item.cls or item.module)).index(item.originalname)
    return place + zlib.crc32(f"{item.path.name} {_other_parameters(item)}".encode())


def _is_skipped(item: pytest.Item) -> bool:
    """Whether a mark says that the test is skipped here, as for want of uvloop."""
    return any(mark.args[:1] == (True,) for mark in item.iter_markers("skipif"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that prints the summary, if this is one of pytest-xdist's workers."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = session.config.stash[_left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker has left out: each has collected, and left out, the same."""
    output = getattr(node, "workeroutput", None)
    if output is not None:
        node.config.stash[_left_out] = cast("dict[str, int]", output["left_out"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out."""
    if config.getoption("full"):
        terminalreporter.write_line(f"--full does not include {ELSEWHERE}.")
        return
    left_out = config.stash[_left_out]
    parts = [
        f"{left_out.get(key, 0)} {what}"
        for key, what in (
            ("combinations", "further combinations of loop and backend"),
            ("long", "that take long"),
        )
        if left_out.get(key)
    ]
    if parts:
        terminalreporter.write_line(f"Left out of {left_out['tests']} tests: {', '.join(parts)}. --full runs them.")
    if left_out.get("short"):
        terminalreporter.write_line(f"In a short form: {left_out['short']} tests. --full runs the long one.")
