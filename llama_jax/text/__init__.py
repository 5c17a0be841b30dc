"""Tokenizers, chat templates and tool calls. Imports no JAX."""
