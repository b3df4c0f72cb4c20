"""What a run leaves behind and what a restart finds: the run folder, its checkpoints, and how they get to disk."""
