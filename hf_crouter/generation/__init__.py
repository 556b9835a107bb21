"""`generate` with a compressed past: the mixin in front of a host's class, drafts, the report."""
