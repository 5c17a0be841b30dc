"""From the checkpoints that people publish to the one layout that `llama_jax` loads.

`dialects` turns each tool's names and scales into the canonical parameter tree, `pipeline` streams
any of them into an Orbax directory, `resolve` does so once for whatever a user names.
"""
