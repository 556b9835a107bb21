"""What compressing, copying, retrieval and training cost, measured side by side in one run where it is a ratio."""
