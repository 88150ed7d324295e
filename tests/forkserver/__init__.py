"""Tests of the wing `_forkserver`."""
