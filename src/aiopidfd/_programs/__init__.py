"""Programs: started without a stall of the loop, with pipes and transports that are the same on every loop.

It works on any loop that has `add_reader` and `add_writer`; it knows no loop class, no watcher and no forked child.
"""
