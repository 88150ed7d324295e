"""Tests of the wing `_fork`."""
