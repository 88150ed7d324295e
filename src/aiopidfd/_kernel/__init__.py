"""The kernel and /proc as we use them: typed calls that raise OSError, and the exit status of a process.

It knows nothing of asyncio: no loop, no callback, no watched child.
"""
