"""A short run of the chaos on every loop and backend: no promise is broken."""

from __future__ import annotations

import pytest

from ..conftest import BACKENDS, LOOPS
from ..helpers.children import Stranger, few_descriptors
from ..helpers.seccomp import compile_c
from .test_stress import stress


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LOOPS)
def test_chaos_breaks_no_promise(kind: str, backend: str) -> None:
    compile_c("other_reaper.c", "-O1", "-shared", "-fPIC", "-pthread")  # skips the test without a compiler
    children = 0
    for seconds in ("4", "60"):  # a busy machine starts few children in 4 s
        if children < 50:
            run = stress("--chaos", "--seconds", seconds, "--seed", "3", "--loop", kind, "--backend", backend)
            assert run.returncode == 0, run.stderr + run.stdout  # the figures come last: a log may show the end only
            figures = dict(line.split(maxsplit=1) for line in run.stdout.splitlines()[1:])
            assert [figures[name] for name in ("lost", "wrong", "hung", "errors", "descriptors", "zombies")] == ["0"] * 6
            children = int(figures["children"].split()[0])
    assert children >= 50
    assert int(figures["mischief"].split()[0]) > 0


@pytest.mark.parametrize("free", range(6))
def test_stranger_that_cannot_be_leaves_nothing(free: int) -> None:
    """The chaos starts one when there are few descriptors, or none."""
    with few_descriptors(free):
        try:
            stranger = Stranger()
        except OSError:
            assert free < 4  # a pair of sockets, and Popen's own pipe if it makes one
        else:
            assert free >= 2
            stranger.__exit__()


def test_chaos_takes_no_other_hostility() -> None:
    assert stress("--chaos", "--hostile").returncode == 2
