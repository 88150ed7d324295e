"""One registry per loop: each watched process is reaped once, and each of its observers is notified once.

This wing knows how a process is watched. It does not know how it was started: no transport, no fork.
"""
