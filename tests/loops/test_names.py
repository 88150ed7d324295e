"""The public names, and which of them are available where."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import typing
from typing import Any

import pytest

import aiopidfd
from aiopidfd._loops import policy

from ..helpers.children import undebugged_environment

ALWAYS = {"ForkServer", "PidfdWatcher", "SelectorEventLoop", "afork", "features", "run", "wait"}


def run_python(script: str) -> str:
    """Run a script that must not write to stderr, and return what it prints."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    ran = subprocess.run(command, capture_output=True, check=False, text=True, timeout=60, env=undebugged_environment())
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


STAR = """
    from aiopidfd import *
    print(*sorted(name for name in globals() if not name.startswith("__")))
"""
WITHOUT_UVLOOP = """
    import sys
    sys.modules["uvloop"] = None
"""
WITH_A_BROKEN_UVLOOP = """
    import builtins, sys
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "uvloop":
                raise ImportError("undefined symbol: it is another Python's")
    sys.meta_path.insert(0, Broken())
"""
WITHOUT_POLICIES = """
    import asyncio, warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.DefaultEventLoopPolicy
    asyncio.__dict__.pop("DefaultEventLoopPolicy", None)
    asyncio.__getattr__ = lambda name: (_ for _ in ()).throw(AttributeError(name))
"""


@pytest.mark.parametrize(
    ("world", "missing"),
    [
        ("", set()),
        (WITHOUT_UVLOOP, {"UvloopEventLoop"}),
        (WITH_A_BROKEN_UVLOOP, {"UvloopEventLoop"}),
        (WITHOUT_POLICIES, {"EventLoopPolicy"}),
        (WITHOUT_UVLOOP + WITHOUT_POLICIES, {"EventLoopPolicy", "UvloopEventLoop"}),
    ],
    ids=["all", "no uvloop", "broken uvloop", "no policies", "neither"],
)
def test_import_of_all_names_gives_those_that_can_be_had(world: str, missing: set[str]) -> None:
    if "UvloopEventLoop" not in missing:
        pytest.importorskip("uvloop")
    names = set(run_python(textwrap.dedent(world) + textwrap.dedent(STAR)).split())
    assert names & {"EventLoopPolicy", "UvloopEventLoop"} == {"EventLoopPolicy", "UvloopEventLoop"} - missing
    assert names >= ALWAYS
    assert run_python(textwrap.dedent(world) + "import aiopidfd; print('UvloopEventLoop' in dir(aiopidfd))") == "True\n"


def test_all_names_are_those_that_type_checkers_read() -> None:
    source = typing.cast(str, aiopidfd.__spec__.loader.get_source("aiopidfd"))  # type: ignore[union-attr] # it has one
    written = {line.strip(' ",') for line in source.partition("__all__ = [")[2].partition("]")[0].split()}
    assert {*aiopidfd.__all__} <= written <= {*dir(aiopidfd)}
    assert written - {*aiopidfd.__all__} <= {"EventLoopPolicy", "UvloopEventLoop"}


def test_python_without_policies_gets_an_error_that_says_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Python 3.16."""

    class Without:
        """asyncio without what was removed."""

        def __getattr__(self, name: str) -> Any:
            if "Policy" in name or "policy" in name:
                raise AttributeError(name)
            return getattr(asyncio, name)

    monkeypatch.setattr(policy, "asyncio", Without())
    monkeypatch.delitem(vars(aiopidfd), "EventLoopPolicy", raising=False)
    with pytest.raises(ImportError, match=r"Python 3\.16 has removed: use aiopidfd\.run"):
        _ = aiopidfd.EventLoopPolicy
    with pytest.raises(ImportError, match="loop_factory"):
        from aiopidfd import EventLoopPolicy  # noqa: F401
    assert "EventLoopPolicy" not in aiopidfd.__all__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = aiopidfd.no_such_name


def test_tests_of_ctrl_c_pass_where_the_caller_ignores_it() -> None:
    """A shell ignores SIGINT in a background job."""
    tests = ["tests/loops/test_run.py", "-k", "interrupt or ctrl or sigint"]
    command = ["env", "--ignore-signal=INT", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout
