"""`ForkServer`: a small process that forks workers, so that a fork takes the same time however large its parent is.

What a worker runs, and its handle, are those of `afork`.
"""
