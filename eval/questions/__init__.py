"""Questions over long texts: whether retrieval finds the answer, and RULER's tasks."""
