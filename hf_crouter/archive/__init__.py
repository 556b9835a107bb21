"""The past of one row, kept off the accelerator: what copying draws from."""
