"""Programs: start them without blocking the loop, and connect their pipes in the same way on every loop.

A loop needs `add_reader` and `add_writer`. This wing knows no loop class, no child watcher and no forked child.
"""
