"""Converted checkpoints on disk: their files, how they are read and checked."""
