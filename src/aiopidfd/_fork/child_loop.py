"""What a forked child forgets of its parent: the event loop that is set, and whom its child watcher watches.

Facts of asyncio: a policy keeps the loop that is set in its `_local`. On Python 3.9 to 3.13 it has a child watcher, too.
To set no loop detaches the watcher from the one before, which warns of pending handlers, and touches that loop and SIGCHLD.
A watcher that is kept as it is would in a child go on to wait for the parent's children, at the next loop that is set.
"""

from __future__ import annotations

import warnings
from asyncio import events
from typing import Any

from .._loops.policy import make_policy_class

# Whose set_event_loop does no more than to set it, and to tell the child watcher.
_SIMPLE_POLICY_MODULES = frozenset({"asyncio.events", "asyncio.unix_events", make_policy_class.__module__})

_WATCHERS = "_watcher", "_aiopidfd_watcher"

# What asyncio's watchers know of loops, children and signals, by the names of attributes, and what a new one knows.
_INITIAL_VALUES: dict[str, object] = {"_loop": None, "_saved_sighandler": None, "_forks": 0}
_CONTAINERS = "_callbacks", "_zombies", "_threads"


def unset_event_loop(policy: object) -> None:
    """Have no loop set, in the way of `policy`, and its child watcher know of no loop and no child."""
    attributes: dict[str, Any] = getattr(policy, "__dict__", {})
    for name in _WATCHERS:
        if attributes.get(name) is not None:
            _reset_watcher(attributes[name])
    if getattr(type(policy), "set_event_loop", None).__module__ not in _SIMPLE_POLICY_MODULES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            events.set_event_loop(None)
    elif attributes["_local"]._loop is not None:
        attributes["_local"]._loop = None


def _reset_watcher(watcher: object) -> None:
    attributes: dict[str, Any] = getattr(watcher, "__dict__", {})
    for name, value in _INITIAL_VALUES.items():
        if name in attributes:
            attributes[name] = value
    for name in _CONTAINERS:
        if attributes.get(name):
            attributes[name].clear()
    if "_zombies" in attributes and "_lock" in attributes:
        attributes["_lock"]._at_fork_reinit()
