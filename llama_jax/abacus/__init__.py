"""Abacus: the small Llama 3.1-architecture model that ships with the project, and its making.

``checkpoint`` holds it with FP8 weights in FriendliAI's layout, ``checkpoint_bf16`` before
quantisation. ``python -m llama_jax.abacus.train`` makes both from nothing,
``python -m llama_jax.abacus.evaluate`` compares them on held-out questions.
"""

from pathlib import Path

SHIPPED_MODEL = Path(__file__).parent / "checkpoint"
