"""What a checkpoint's files raise: a message names the file, what was found, what is expected."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or laid out in a way that is not supported."""


class ConfigError(CheckpointError):
    """A configuration that is incomplete, contradictory or not implemented."""
