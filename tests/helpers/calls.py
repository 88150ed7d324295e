"""A callback that a test can look at."""

from __future__ import annotations

import asyncio
import threading
from typing import Any


class Calls:
    """A callback that remembers its calls and can be awaited."""

    def __init__(self, expected: int = 1) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[int] = set()
        self._all = asyncio.get_running_loop().create_future()
        self._expected = expected

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)
        self.threads.add(threading.get_ident())
        if len(self.calls) == self._expected:
            self._all.set_result(None)

    async def all(self) -> list[tuple[Any, ...]]:
        await self._all
        return self.calls


async def drain() -> None:
    """Let the loop see everything that is ready now: each round polls its descriptors once."""
    for _ in range(5):
        await asyncio.sleep(0)
