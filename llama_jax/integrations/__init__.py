"""Integrates this engine into other people's tools. Each module needs an extra."""
