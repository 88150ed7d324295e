"""How the exit of a process is noticed: by pidfd, or by SIGCHLD where pidfds are forbidden or no descriptor is left.

This wing knows pids and descriptors only: no loop, no callback, no observer.
"""
