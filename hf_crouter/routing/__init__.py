"""From reconstruction NLLs to decisions."""
