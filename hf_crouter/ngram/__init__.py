"""Every place where some last tokens stood before, and what followed: what copying and retrieval draw from."""
