"""The host's side: fingerprints, projector, compressed cache, generation and report."""
