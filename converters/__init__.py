"""Converters from the checkpoints that people publish to the one layout that `llama_jax` loads.

`dialects` maps each tool's names and scales to the canonical parameter tree, `pipeline` streams any
of them into an Orbax directory, and `resolve` does so once for whatever a user names.
"""
