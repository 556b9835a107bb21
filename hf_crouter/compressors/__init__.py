"""What turns a chunk that leaves the window into entries of the cache."""
