"""Trainings from start to end: a federation, or federations of one side by side, and the server's books around the rounds."""
