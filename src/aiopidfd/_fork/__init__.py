"""`afork()`: a forked child that inherits no event loop, is watched before it runs any code, and has a handle.

This wing knows nothing of fork servers.
"""
