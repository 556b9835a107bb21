"""What a host writes with a compressed past: facts, next lines, names, and where copying could do harm."""
