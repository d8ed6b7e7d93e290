"""Kinds of problems, one file each; what a task has to offer is written at `classify.Task`."""
