"""Tests of the wing `_loops`."""
