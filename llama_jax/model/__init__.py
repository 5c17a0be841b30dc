"""The model: architecture, parameters, forward pass, KV cache, and how all of it is sharded."""
