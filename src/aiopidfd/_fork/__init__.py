"""`afork`: a forked child that starts clean, is watched before it runs, and has a handle.

It knows nothing of fork servers.
"""
