"""This module has the options of a server, and the bounds on what one request may ask."""

import math
from dataclasses import dataclass
from pathlib import Path

MAX_BODY_BYTES = 16 << 20
# Reading a body keeps the event loop. Commas, brackets and colons tell how long: a million of these
# units take about a tenth of a second. 16 MiB of text or of token ids stay below, and what is below
# a tenth of that is not counted.
MAX_BODY_UNITS, UNCOUNTED_BODY_BYTES = 3_000_000, MAX_BODY_BYTES // 10
UNITS = {b",": 1, b"[": 2, b"{": 2, b":": 5}
MAX_FILE_BYTES = 200 << 20  # of a batch, with the form around it
MAX_HEADER_BYTES = 64 << 10  # that come after the first part of a request's headers
BODY_SECONDS = 60.0  # in which a body has to have arrived, or the next part of an upload
HEADER_SECONDS = 10.0  # in which a request's headers have to have arrived
MAX_N = 128
MAX_PROMPTS = 1024  # in one completion request, and completions in one scoring request
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_STOP_IDS = 256
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_TOKEN_IDS = 1 << 20  # in one prompt
MAX_UNKNOWN = 256  # fields that nobody knows
# Prompts that wait may hold so many times the tokens of the whole cache, and not fill the memory.
WAITING_POOLS = 32


@dataclass(frozen=True)
class ServeOptions:
    """Options say where a server listens, and what it allows.

    host, port: where to listen; port 0 takes a free one. metrics_port: for /metrics alone.
    names: what requests may call the model, the first in replies.
    api_keys: one of them has to be sent; none asks for none.
    max_waiting: sequences that may wait for a row. request_timeout: seconds for one request, from
    its arrival to its last byte. drain_timeout: seconds that running requests get after SIGTERM.
    allowed_origins: of pages whose scripts may call the server ("*" for all). log_texts: write
    bodies of requests to the log. batch_dir: where files and batches are kept; None for none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int | None = None
    names: tuple[str, ...] = ("abacus",)
    api_keys: tuple[str, ...] = ()
    max_waiting: int = 2048
    request_timeout: float = 600.0
    drain_timeout: float = 30.0
    allowed_origins: tuple[str, ...] = ()
    log_texts: bool = False
    batch_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port < 1 << 16:
                raise ValueError(f"{name} must be in [0, 65535], got {port}")
        for name in ("request_timeout", "drain_timeout"):
            seconds = getattr(self, name)
            if not 0 < seconds < math.inf:
                raise ValueError(f"{name} must be a positive number of seconds, got {seconds}")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting must be at least 0, got {self.max_waiting}")
        if not self.names or not all(self.names):
            raise ValueError("names must have at least one name, and no empty one")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError("an API key must consist of printable ASCII without spaces")

    @property
    def is_local(self) -> bool:
        """Return whether only this machine can reach the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")
