"""The plug: loop classes, a policy and a child watcher whose programs and children go through the registry.

It knows nothing of forked children.
"""
