"""Tests of the wing `_programs`."""
