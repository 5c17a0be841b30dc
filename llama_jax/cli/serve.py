"""Implements `llama-jax serve`: an HTTP server with OpenAI's endpoints."""

import importlib.util
import json
import logging
import os
import shlex
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from converters.locate import locate
from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.cli import options
from llama_jax.cli.output import note, stderr

if TYPE_CHECKING:
    from llama_jax.serve.service import Service

_KEY = "LLAMA_JAX_API_KEY"
_SERVER, _LIMITS = "Server", "Limits"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "pydantic", "llguidance", "python_multipart")


def serve(
    model: options.Model = None,
    hf_model_name: Annotated[
        str | None, typer.Option(help="The same as MODEL.", rich_help_panel=_SERVER)
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all.", rich_help_panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", "--web-server-port", help="Port to listen on; 0 for a free one.",
        rich_help_panel=_SERVER),
    ] = 8000,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="A second port with only /metrics.", rich_help_panel=_SERVER),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A key that clients have to send; may be repeated. Better in ${_KEY}, so that "
            "other users of the machine cannot see it.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="The model's name for clients; may be repeated.", rich_help_panel=_SERVER,
            show_default="MODEL",
        ),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin of web pages whose scripts may call the server (CORS); may be repeated.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    batch_dir: Annotated[
        Path | None,
        typer.Option(
            help="Serve /v1/files and /v1/batches, with their files in this directory.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    enable_log_requests: Annotated[
        bool,
        typer.Option(
            "--enable-log-requests", help="Log the bodies of requests, including their texts.",
            rich_help_panel=_SERVER,
        ),
    ] = False,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len", "--max-seq-len", min=2,
            help="Most tokens of a prompt and its output together.",
            show_default="the model's context, at most 8192", rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int,
        typer.Option(
            "--max-num-seqs", "--max-batch-size", min=1, help="Most sequences at the same time.",
            rich_help_panel=_LIMITS,
        ),
    ] = 32,
    max_waiting: Annotated[
        int,
        typer.Option(min=0, help="Most sequences that wait; beyond that, 429.",
        rich_help_panel=_LIMITS),
    ] = 2048,
    request_timeout: Annotated[
        float, typer.Option(help="Most seconds for one request.", rich_help_panel=_LIMITS)
    ] = 600.0,
    shutdown_timeout: Annotated[
        float,
        typer.Option(help="Seconds for running requests after SIGTERM.", rich_help_panel=_LIMITS),
    ] = 30.0,
    num_devices: Annotated[
        int,
        typer.Option(
            "--num-devices", "--tensor-parallel-size", min=1, help="Devices to shard over."
        ),
    ] = 1,
    dtype: options.DType = "bfloat16",
    activations: options.Activations = "auto",
    kv_dtype: Annotated[
        str,
        typer.Option(
            "--kv-dtype", "--kv-cache-dtype", metavar="[bf16|fp8]",
            help="Format of the key/value cache: bf16 (--dtype) or fp8.",
        ),
    ] = "bf16",
    num_speculative_tokens: options.NumSpeculativeTokens = None,
    draft: options.Draft = None,
) -> None:  # fmt: skip
    """Serve a model over HTTP, with OpenAI's endpoints (extra `serve`): chat and text completions,
    tools, streams, scores.

    It accepts connections from this machine alone unless --host is given. /health succeeds at once,
    /ready when everything is compiled; SIGTERM lets running requests end. Names of vLLM's options
    are accepted, and those of FriendliAI's container.

    **Examples**

        llama-jax serve
        llama-jax serve ./llama-8b --port 8080 --max-num-seqs 64 --max-model-len 8192
        LLAMA_JAX_API_KEY=secret llama-jax serve ./llama-8b --host 0.0.0.0 --batch-dir ./batches
        llama-jax serve --hf-model-name meta-llama/Llama-3.1-8B-Instruct --web-server-port 8000
    """
    check_extra()
    if model is not None and hf_model_name is not None:
        raise typer.BadParameter("give MODEL or --hf-model-name, not both")
    if kv_dtype not in ("bf16", "fp8"):
        raise typer.BadParameter(f"expected bf16 or fp8, got {kv_dtype}", param_hint="--kv-dtype")
    model = model if model is not None else hf_model_name
    keys = tuple(api_key or ()) or tuple(filter(None, [os.environ.get(_KEY)]))
    from llama_jax.serve.options import ServeOptions
    from llama_jax.serve.sockets import listen

    asked = ServeOptions(
        host=host, port=port, metrics_port=metrics_port, api_keys=keys,
        names=tuple(served_model_name or (options.model_name(model),)),
        max_waiting=max_waiting, request_timeout=request_timeout, drain_timeout=shutdown_timeout,
        allowed_origins=tuple(allowed_origins or ()), log_texts=enable_log_requests,
        batch_dir=batch_dir,
    )  # fmt: skip
    if not asked.is_local and not keys:
        note(f"warning: everybody who can reach {host} may use this server: give --api-key")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for noisy in ("uvicorn", "jax", "asyncio", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Bad options are reported before JAX is imported and a model loaded.
    locate(SHIPPED_MODEL if model is None else model)
    for each in (port, metrics_port or 0):
        listen(host, each).close()
    if batch_dir is not None:
        from llama_jax.serve.batch_store import BatchStore

        BatchStore(batch_dir).close()
    from llama_jax.model.sharding import make_mesh
    from llama_jax.serve.server import serve as run

    llm = options.load(
        model, show_plan=True, dtype=dtype, activations=activations, kv_dtype=kv_dtype,
        max_seq_len=max_model_len, max_batch_size=max_num_seqs, draft=draft,
        num_speculative_tokens=num_speculative_tokens,
        mesh=make_mesh(num_devices) if num_devices > 1 else None,
    )  # fmt: skip

    root = str(SHIPPED_MODEL if model is None else Path(model))
    note(f"compiling programs for {asked.names[0]}, or fetching them from the cache")
    status = run(llm, asked, root, on_ready=_announce)
    if any(thread.name == "engine" for thread in threading.enumerate()):
        logging.shutdown()
        os._exit(status)  # a thread inside XLA might hang or crash at exit
    raise typer.Exit(status)


def check_extra() -> None:
    """Raise an error that says what to install if the extra is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{missing[0]} is missing: pip install "llama-jax[serve]"')


def _announce(service: "Service", url: str) -> None:
    """Print what is served, where, and how to try it."""
    engine = service.llm.engine
    tokens = engine.options.pool_size * engine.pages.page_size
    note(
        f"serving {', '.join(service.options.names)} at {url}/v1 · ready after "
        f"{service.warmup_seconds:.1f} s of warm-up\n"
        f"{engine.options.max_batch_size} sequences at a time of up to {service.llm.max_seq_len} "
        f"tokens, cache for {tokens:,} tokens"
    )
    stderr.print(curl_line(service, url), markup=False, highlight=False, soft_wrap=True)


def curl_line(service: "Service", url: str) -> str:
    """Return a command that sends a request to the server at `url`."""
    message = {"role": "user", "content": "What is 47 + 85?"}
    body = json.dumps({"model": service.name, "messages": [message]})
    key = f' -H "Authorization: Bearer ${_KEY}"' if service.options.api_keys else ""
    kind = "-H 'Content-Type: application/json'"
    return f"curl {url}/v1/chat/completions{key} {kind} -d {shlex.quote(body)}"
