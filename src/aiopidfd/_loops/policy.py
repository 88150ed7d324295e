"""`EventLoopPolicy`, for programs that set an event loop policy."""

from __future__ import annotations

import asyncio
import threading
import warnings
from typing import Any

from .loops import LoopFactory, best_loop_factory
from .watcher import PidfdWatcher


def make_policy_class() -> type[Any]:
    """Make the class `EventLoopPolicy`. Made on demand: Python 3.14 warns of each access to asyncio's policy classes.

    ImportError: this Python has no event loop policies (3.16 and newer).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            base: type[Any] = asyncio.DefaultEventLoopPolicy
        except AttributeError:
            raise ImportError(
                "EventLoopPolicy needs asyncio's event loop policies, which Python 3.16 has removed: use "
                "aiopidfd.run(main()), or asyncio.run(main(), loop_factory=aiopidfd.SelectorEventLoop)",
                name="aiopidfd",
            ) from None

    class EventLoopPolicy(base):  # type: ignore[misc] # the base depends on the Python version
        """An event loop policy (Python 3.9 to 3.15) that makes loops by `loop_factory`.

        The default is `UvloopEventLoop` if uvloop is installed, else `SelectorEventLoop`. On Python 3.9 to 3.13
        `asyncio.get_child_watcher` and `set_child_watcher` work, also with uvloop.
        """

        def __init__(self, loop_factory: LoopFactory | None = None) -> None:
            super().__init__()
            self._aiopidfd_factory = loop_factory or best_loop_factory()
            self._aiopidfd_watcher: Any = None

        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            """Return a new loop."""
            return self._aiopidfd_factory()

        def get_child_watcher(self) -> Any:
            """Return the child watcher: a `PidfdWatcher` unless another one was set."""
            if self._aiopidfd_watcher is None:
                self._aiopidfd_watcher = PidfdWatcher()
            return self._aiopidfd_watcher

        def set_child_watcher(self, watcher: Any) -> None:
            """Set the child watcher and close the previous one. Subprocesses of our loops need none."""
            if self._aiopidfd_watcher is not None:
                self._aiopidfd_watcher.close()
            self._aiopidfd_watcher = watcher

        def set_event_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
            """Set the current loop. In the main thread, attach the child watcher to it, as asyncio's policy does."""
            super().set_event_loop(loop)
            if self._aiopidfd_watcher is not None and threading.current_thread() is threading.main_thread():
                self._aiopidfd_watcher.attach_loop(loop)

    EventLoopPolicy.__module__ = "aiopidfd"
    EventLoopPolicy.__qualname__ = "EventLoopPolicy"
    return EventLoopPolicy
