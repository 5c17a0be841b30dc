"""Converts published checkpoints of any layout to the one layout that `llama_jax` loads.

`dialects` maps each tool's names and scales to the canonical parameter tree, `pipeline` streams it
into an Orbax directory, and `resolve` does so once for each checkpoint that a user names.
"""
