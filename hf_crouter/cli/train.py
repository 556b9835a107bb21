"""`hf-crouter train`: stage 1, the crouter learns to rebuild chunks."""

NAME = "train"
HELP = "train a crouter on a corpus (stage 1)"
