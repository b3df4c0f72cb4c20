"""What one process holds once for everybody it hosts: the frozen model, the rows, and what clients train on instead of it."""
