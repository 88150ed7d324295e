"""Tests of the wing `_backends`."""
