"""How long an event loop stands still while something is being done on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter_ns


async def measure_stall(operation: Callable[[], Awaitable[object]]) -> float:
    """Run `operation` and return the longest time, in microseconds, for which a busy loop did nothing else.

    The loop is kept busy by a callback that reschedules itself, so that each of its rounds is seen. Do not time
    `operation` while this runs.
    """
    loop = asyncio.get_running_loop()
    last_ns = perf_counter_ns()
    longest_ns = 0
    running = True

    def tick() -> None:
        nonlocal last_ns, longest_ns
        now_ns = perf_counter_ns()
        longest_ns = max(longest_ns, now_ns - last_ns)
        last_ns = now_ns
        if running:
            loop.call_soon(tick)

    loop.call_soon(tick)
    try:
        await operation()
    finally:
        running = False
    return max(longest_ns, perf_counter_ns() - last_ns) / 1000
