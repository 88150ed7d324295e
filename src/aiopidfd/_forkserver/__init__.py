"""`ForkServer`: a small process that forks workers, in the same time however much memory its parent has.

Workers run functions and have handles as children of `afork()`.
"""
