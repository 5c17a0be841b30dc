"""Defines the command line, `llama-jax`, with one module per command.

Modules that run a model are imported inside the commands, so that `llama-jax --help` is quick.
Results go to stdout; tables, progress and messages go to stderr.
"""

import os
import sys

from llama_jax.cli import signals

if os.path.basename(sys.argv[0]) in ("llama-jax", "-m"):  # run as a program, not imported
    signals.install()

import errno
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from llama_jax.cli.batch import batch
from llama_jax.cli.bench import bench
from llama_jax.cli.bench_serve import bench_serve
from llama_jax.cli.chat import chat
from llama_jax.cli.compare import compare
from llama_jax.cli.convert import convert
from llama_jax.cli.eval import eval
from llama_jax.cli.export import export
from llama_jax.cli.generate import generate
from llama_jax.cli.inspect import inspect
from llama_jax.cli.output import in_few_lines, note, stderr
from llama_jax.cli.score import score
from llama_jax.cli.serve import serve
from llama_jax.cli.verify import verify

_DEBUG = "LLAMA_JAX_DEBUG"
# Errors that mean bad input. Other OSErrors, such as a full disk, are failures.
_BAD_INPUT = (
    ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
    PermissionError,
)  # fmt: skip
_BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    chat, generate, score, serve, batch, eval, convert, export, verify, inspect, compare, bench,
    bench_serve,
):  # fmt: skip
    app.command()(command)


def _show_version(value: bool) -> None:
    if value:
        try:
            print(version("llama-jax"))
        except PackageNotFoundError:  # a source tree that is not installed
            print("unknown")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show the traceback of an error (or {_DEBUG}=1).")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Llama 3.1 with FP8 weights on JAX: convert, inspect, run and measure a model.

    A MODEL is a converted checkpoint, a Hugging Face or Meta directory, or a hub id (org/name);
    without one it is abacus, the small model that ships with llama-jax.

    **First steps**

        llama-jax chat -m "What is 47 + 85?"
        llama-jax chat                                  # a conversation
        llama-jax inspect path/to/Llama-3.1-8B-FP8      # what is it, and will it fit?
        llama-jax COMMAND --help                        # examples for each command
    """
    if debug:
        os.environ[_DEBUG] = "1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 0, 2 for bad input, 1 for a failure, 130 when interrupted.

    arguments: without the program's name; by default those of sys.argv.
    """
    try:
        app(args=arguments)
    except _BAD_INPUT as error:
        _report(error)
        sys.exit(2)
    except (OSError, MemoryError, RuntimeError) as error:
        _report(error)
        sys.exit(2 if isinstance(error, OSError) and error.errno in _BAD_NAMES else 1)
    except KeyboardInterrupt:  # before the command began; Typer handles later ones
        sys.exit(130)


def _report(error: Exception) -> None:
    if os.environ.get(_DEBUG):
        traceback.print_exception(error)
    message = in_few_lines(_words(error)) or type(error).__name__
    stderr.print("[bold red]error:[/bold red]", end=" ")
    stderr.print(message, markup=False, highlight=False, soft_wrap=True)
    if isinstance(error, RuntimeError) and not os.environ.get(_DEBUG):
        note("llama-jax --debug ... shows where")


def _words(error: Exception) -> str:
    """Return the message of an error. System errors lose their number, and begin with the file."""
    if isinstance(error, OSError) and error.filename and error.strerror and not error.filename2:
        return f"{error.filename}: {error.strerror}"
    return str(error)
