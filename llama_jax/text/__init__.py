"""Text in and out: tokenizers, chat templates and tool calls. Needs no JAX."""
