"""Ends the program on Ctrl-C with code 130, and on SIGTERM with code 143 and a message.

Python raises KeyboardInterrupt wherever it happens to be. Inside an import it would show a
traceback or an error of the imported module. It would be lost inside a callback of the garbage
collector, of which JAX has one, and while JAX loads plugins such as CUDA's, where it catches
everything.
"""

import _thread
import os
import signal
import threading
from types import FrameType

_IMPORT = "<frozen importlib._bootstrap>"
_LOSING = ("_xla_gc_callback", "__del__", "discover_pjrt_plugins")


def install() -> None:
    """Handle both signals from now on. To be called before anything else is imported."""
    signal.signal(signal.SIGINT, _interrupted)
    signal.signal(signal.SIGTERM, _terminated)


def _interrupted(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            os._exit(128 + number)  # no file is open; a conversion can be resumed
        if frame.f_code.co_name in _LOSING:
            threading.Timer(0.01, _thread.interrupt_main).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _terminated(number: int, frame: FrameType | None) -> None:
    os.write(2, b"llama-jax: terminated\n")
    os._exit(128 + number)
