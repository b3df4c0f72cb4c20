"""What a run would train, exchange, hold and compute, from shapes alone; the command is `python -m fedmpi.plan`."""
