"""llama-jax: Llama 3.1 with FP8 weights on JAX."""
