"""Tests of the wing `_watch`."""
