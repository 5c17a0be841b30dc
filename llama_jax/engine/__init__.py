"""The engine: continuous batching of requests, in calls of compiled programs."""
