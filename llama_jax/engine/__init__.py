"""The engine, which runs requests in continuous batches through compiled programs."""
