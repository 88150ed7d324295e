"""The kernel and /proc: typed calls that raise OSError, and the exit status of a process.

This wing knows nothing of asyncio: no loop, no callback, no watched child.
"""
