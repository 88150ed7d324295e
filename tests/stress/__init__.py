"""Many children at once, at random, in a process with hostile code."""
