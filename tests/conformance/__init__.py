"""CPython's own tests, and other projects' servers and plugins, on our loops."""
