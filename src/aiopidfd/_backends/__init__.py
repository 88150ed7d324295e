"""How the end of a process is noticed: by pidfd, or by SIGCHLD where pidfds are forbidden or descriptors are short.

It knows pids and descriptors only: no loop, no callback, and nobody who waits.
"""
