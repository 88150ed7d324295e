"""Tests of the wing `_kernel`."""
