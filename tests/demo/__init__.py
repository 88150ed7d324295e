"""Tests of the wing `_demo`, and of the command line."""
