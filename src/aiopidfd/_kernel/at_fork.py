"""The only at-fork hook of this package. It calls functions in each forked child, in order."""

from __future__ import annotations

import os
from collections.abc import Callable

_functions: list[Callable[[], None]] = []


def call_in_forked_children(function: Callable[[], None]) -> None:
    """Call `function` in each forked child from now on, before the child's own code. A second call has no effect."""
    if function in _functions:
        return
    if not _functions:  # registered late, so that hooks of the application run first
        os.register_at_fork(after_in_child=_call_all)
    _functions.append(function)


def _call_all() -> None:
    for function in _functions:
        function()
