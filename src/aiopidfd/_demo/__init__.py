"""`python -m aiopidfd demo`: a server whose workers are killed and replaced.

It uses public names only.
"""
