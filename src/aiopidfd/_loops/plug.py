"""Plug into a loop: replace its two methods that start subprocesses. Works with a loop of any class."""

from __future__ import annotations

import asyncio
import weakref
from functools import partial
from typing import Any

from .._programs.loop_methods import Transported, subprocess_exec, subprocess_shell


class Plugged:
    """The mixin of our loop classes. It stands before the loop class among the bases, so these methods are used."""

    subprocess_exec = subprocess_exec
    subprocess_shell = subprocess_shell


# Loops of other classes, each with the watchers that are plugged into it. A watcher that was garbage collected stays
# plugged.
_plugs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[weakref.ref[object]]] = weakref.WeakKeyDictionary()


def plug(loop: asyncio.AbstractEventLoop, watcher: object) -> None:
    """Have `loop` start its subprocesses by our functions, until each watcher that called this has called `unplug`."""
    if isinstance(loop, Plugged):
        return
    plugs = _plugs.setdefault(loop, set())
    if not plugs:
        # Set on the instance: other loops of its class do not change. Weak: the loop must not refer to itself.
        for function in (subprocess_exec, subprocess_shell):
            setattr(loop, function.__name__, partial(_call_plugged, function, weakref.ref(loop)))
    plugs.add(weakref.ref(watcher))


def unplug(loop: asyncio.AbstractEventLoop, watcher: object) -> None:
    """Undo `plug`. The loop has its own methods again when the last watcher is unplugged."""
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
