"""Many children at once, at random, beside all that a process can do to itself."""
