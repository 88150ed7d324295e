"""The one hook that this package has for os.fork(), and the functions that it calls in each forked child, in order."""

from __future__ import annotations

import os
from collections.abc import Callable

_functions: list[Callable[[], None]] = []


def call_in_forked_children(function: Callable[[], None]) -> None:
    """Call `function` in each forked child from now on, before its own code runs. Once more has no effect."""
    if function in _functions:
        return
    if not _functions:  # not before it is needed: hooks that the application has registered until then run first
        os.register_at_fork(after_in_child=_call_all)
    _functions.append(function)


def _call_all() -> None:
    for function in _functions:
        function()
