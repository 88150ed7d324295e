"""The plug: the subprocesses of a loop go through its registry, whatever its class."""

from __future__ import annotations

import asyncio
import weakref
from functools import partial
from typing import Any

from .._programs.loop_methods import Transported, subprocess_exec, subprocess_shell


class Plugged:
    """What our loop classes have before the loop that they extend: the loop is the first argument of these functions."""

    subprocess_exec = subprocess_exec
    subprocess_shell = subprocess_shell


# Loops that somebody else made, and the watchers that have plugged into them. A watcher that was dropped stays plugged.
_plugs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[weakref.ref[object]]] = weakref.WeakKeyDictionary()


def plug(loop: asyncio.AbstractEventLoop, watcher: object) -> None:
    """Have the subprocesses of `loop` go through its registry, until every watcher that plugged it has unplugged it."""
    if isinstance(loop, Plugged):
        return
    plugs = _plugs.setdefault(loop, set())
    if not plugs:
        # On the instance, so that other loops of the class stay as they are. Weak: the loop must not hold itself.
        for function in (subprocess_exec, subprocess_shell):
            setattr(loop, function.__name__, partial(_call_plugged, function, weakref.ref(loop)))
    plugs.add(weakref.ref(watcher))


def unplug(loop: asyncio.AbstractEventLoop, watcher: object) -> None:
    """Take back `plug`."""
    plugs = _plugs.get(loop)
    if plugs is None:
        return
    plugs.discard(weakref.ref(watcher))
    if not plugs:
        del _plugs[loop]
        for function in (subprocess_exec, subprocess_shell):
            delattr(loop, function.__name__)


async def _call_plugged(function: Any, loop_ref: Any, *args: Any, **kwargs: Any) -> Transported:
    transported: Transported = await function(loop_ref(), *args, **kwargs)
    return transported
