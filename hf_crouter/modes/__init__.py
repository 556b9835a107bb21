"""Ways to read a compressed past, one file each."""
