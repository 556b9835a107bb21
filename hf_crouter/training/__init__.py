"""Training: stage 1 (reconstruct), stage 2 (align, copying), stage 3 (experts); one loop and its checkpoints."""
