"""Benchmarks of aiopidfd against its peers: `python -m bench --help`."""
