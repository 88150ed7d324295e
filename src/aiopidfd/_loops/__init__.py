"""Loops: loop classes, an event loop policy and a child watcher, whose subprocesses the registry watches.

This wing knows nothing of forked children.
"""
