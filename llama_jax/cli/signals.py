"""Ends the program when it is told to: on Ctrl-C with code 130, on SIGTERM with 143 and a message.

Python raises KeyboardInterrupt wherever it happens to be. Inside an import that shows a traceback,
or an error of the module that was being imported; inside a callback of the garbage collector, of
which JAX has one, it is lost.
"""

import _thread
import os
import signal
import threading
from types import FrameType

_IMPORT = "<frozen importlib._bootstrap>"
_CALLBACKS = ("_xla_gc_callback", "__del__")


def install() -> None:
    """Handle both signals from now on. Called before anything else is imported."""
    signal.signal(signal.SIGINT, _interrupted)
    signal.signal(signal.SIGTERM, _terminated)


def _interrupted(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            os._exit(128 + number)  # nothing is open; a conversion continues after any end
        if frame.f_code.co_name in _CALLBACKS:
            threading.Timer(0.01, _thread.interrupt_main).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _terminated(number: int, frame: FrameType | None) -> None:
    os.write(2, b"llama-jax: terminated\n")
    os._exit(128 + number)
