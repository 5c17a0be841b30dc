"""Implements `llama-jax eval`: tasks of lm-evaluation-harness."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from converters.locate import locate
from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.cli import options
from llama_jax.cli.output import note, print_json, stderr

# Resamplings for a standard error without a formula, which is then right to 2 %.
_BOOTSTRAP_ITERS = 1000


def eval(
    model: options.Model = None,
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            "-t",
            metavar="TASK,...",
            help="The harness's names, which may have a *, or .yaml files; may be repeated.",
        ),
    ] = [],  # noqa: B006  # typer wants a list here
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples before each question.", show_default="the task's"),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            min=0, help="Documents per task, or a share of them if below 1, for a trial run."
        ),
    ] = None,
    include_path: Annotated[
        list[Path] | None,
        typer.Option(help="A directory of your own task files; may be repeated."),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template", help="Put the question into a user's message of a chat."
        ),
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool,
        typer.Option(help="Put examples into earlier turns of that chat, or into the message."),
    ] = True,
    system: Annotated[str | None, typer.Option(help="Instruction before everything.")] = None,
    as_json: options.Json = False,
    dtype: options.DType = "bfloat16",
    activations: options.Activations = "auto",
    kv_dtype: options.KVDtype = "bf16",
    max_seq_len: options.MaxSeqLen = None,
    max_batch_size: options.MaxBatchSize = 8,
) -> None:
    """Evaluate a model on tasks of lm-evaluation-harness. Needs `pip install "llama-jax[eval]"`.

    `python -m llama_jax.integrations.lm_eval` is the harness's own command line, with all its
    options and `--model llama_jax`.

    **Examples**

        llama-jax eval ./llama-8b --tasks hellaswag,arc_easy --limit 100
        llama-jax eval ./llama-8b --tasks gsm8k --num-fewshot 8 --apply-chat-template --json
        llama-jax eval --include-path ./my_tasks --tasks my_task
    """
    if not tasks:
        raise typer.BadParameter("give --tasks NAME,...; `lm-eval ls tasks` lists them")
    if limit == 0:
        raise typer.BadParameter("--limit must be above 0")
    for path in include_path or ():
        if not path.is_dir():
            raise NotADirectoryError(f"--include-path {path} is not a directory")
    locate(SHIPPED_MODEL if model is None else model)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with stderr.status("starting the harness"):
        try:
            from llama_jax.integrations.lm_eval import LlamaJax
        except ModuleNotFoundError as error:
            raise ValueError(str(error)) from error
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table, setup_logging

        setup_logging(logging.WARNING)
        manager = TaskManager(include_path=list(include_path or ()))
    names = _resolve(manager, tasks)
    llm = options.load(
        model, show_plan=model is not None and not as_json, dtype=dtype, activations=activations,
        kv_dtype=kv_dtype, max_seq_len=max_seq_len, max_batch_size=max_batch_size,
    )  # fmt: skip
    # Only results go to stdout.
    with contextlib.redirect_stdout(sys.stderr):
        results = simple_evaluate(
            model=LlamaJax(llm),
            tasks=names,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn,
            system_instruction=system,
            bootstrap_iters=_BOOTSTRAP_ITERS,
            log_samples=False,
        )
    if as_json:
        settings = {
            "model": options.model_name(model), "dtype": dtype, "activations": activations,
            "kv_dtype": kv_dtype, "max_seq_len": llm.max_seq_len, "limit": limit,
            "apply_chat_template": apply_chat_template,
            "fewshot_as_multiturn": fewshot_as_multiturn, "system": system,
        }  # fmt: skip
        print_json(settings | {name: results[name] for name in _REPORTED if name in results})
        return
    for column in ("results", "groups"):
        if column in results:
            print(make_table(results, column))
    if limit is not None:
        note(f"with --limit {limit:g} these are estimates, not the tasks' results")


_REPORTED = (
    "results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better",
    "lm_eval_version",
)  # fmt: skip


def _resolve(manager: Any, tasks: list[str]) -> list[str]:
    """Resolve patterns to the names and files of tasks."""
    names: dict[str, None] = {}
    for task in filter(None, ",".join(tasks).split(",")):
        if task.endswith(".yaml"):
            if not Path(task).is_file():
                raise FileNotFoundError(f"--tasks {task}: there is no such file")
            found = [str(Path(task).absolute())]
        else:
            found = manager.match_tasks([task])
        if not found:
            raise ValueError(
                f"--tasks {task}: the harness has no such task; `lm-eval ls tasks` lists its own, "
                "--include-path adds yours"
            )
        names |= dict.fromkeys(found)
    return list(names)
