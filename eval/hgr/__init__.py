"""History gain recovered: the loss of real documents under every way of reading, beside windows of the same slots."""
