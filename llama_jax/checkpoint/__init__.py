"""Reads, writes and checks converted checkpoints on disk."""
