"""Defines the errors of checkpoint files. Messages name the file, what was found and expected."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or laid out in a way that is not supported."""


class ConfigError(CheckpointError):
    """A configuration that is incomplete, contradictory or not implemented."""
