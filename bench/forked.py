"""What the children of `fork` run. A module of its own, since a spawned child has to import it."""

from __future__ import annotations


def end_at_once() -> int:
    """Be a child with nothing to do."""
    return 0
