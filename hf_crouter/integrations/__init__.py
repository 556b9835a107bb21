"""Other people's harnesses on a host that reads its past compressed."""
