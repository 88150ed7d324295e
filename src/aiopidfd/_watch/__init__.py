"""One registry for each loop: every watched process is reaped once, and each observer is notified once.

It knows how a process is watched, not how it was started: no transport, no fork.
"""
