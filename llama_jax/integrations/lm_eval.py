"""Adds the model `llama_jax` to lm-evaluation-harness (extra `eval`).

`python -m llama_jax.integrations.lm_eval` is the harness's own command line with this model. Texts
are tokenised, truncated and ended as by the harness's `hf` model, so figures are comparable. The
engine forms batches and computes a common prefix of prompts once.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.jobs import Job, run_jobs
from llama_jax.llm import LLM
from llama_jax.results import Generation
from llama_jax.sampling_params import SamplingParams
from llama_jax.text.chat import render_chat

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is missing, which the evaluation harness needs: pip install "
        '"llama-jax[eval]"',
        name=error.name,
    ) from error

# The sampling settings that a task's generation_kwargs may have, besides `until`, `do_sample`,
# `temperature` and the names for the number of tokens.
_SAMPLING = frozenset({
    "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "min_new_tokens",
})  # fmt: skip


@register_model("llama_jax")
class LlamaJax(TemplateLM):
    """A model for the harness. Names of special tokens in its texts become those tokens."""

    def __init__(
        self,
        pretrained: str | Path | LLM = SHIPPED_MODEL,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        """Load a model, or wrap a loaded one.

        pretrained, settings: as in `LLM.load`, or a loaded model.
        max_batch_size: the most sequences at the same time.
        batch_size, device: ignored. The harness passes them to every model ("cuda:0" by default),
            but the engine forms its own batches, and JAX_PLATFORMS selects the device.
        """
        super().__init__()
        if isinstance(pretrained, LLM):
            self.llm = pretrained
        else:
            if max_batch_size is not None:
                settings["max_batch_size"] = max_batch_size
            self.llm = LLM.load(pretrained, **settings)
        self.tokenizer = self.llm.tokenizer
        # The harness's bootstrap would fork this process, whose threads hold locks.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_ids[-1]

    @property
    def prefix_token_id(self) -> int:
        bos_id = self.tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def max_length(self) -> int:
        """Return the most tokens that go into the model; the last of a scored text does not."""
        return self.llm.max_seq_len - 1

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Return the name that identifies a chat template in the harness's cache of requests."""
        source = self.tokenizer.chat_template or self.tokenizer.kind
        return "llama_jax-" + hashlib.blake2b(source.encode(), digest_size=16).hexdigest()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        ids = self.tokenizer.encode(string, parse_special=True)
        prefix = list(self.tokenizer.prefix_ids)
        if add_special_tokens is False or ids[: len(prefix)] == prefix:
            return ids
        return prefix + ids

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages. Without `add_generation_prompt` the last one is left open."""
        if add_generation_prompt:
            return render_chat(self.tokenizer, chat_history)
        return render_chat(self.tokenizer, chat_history, continue_final_message=True)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        jobs = (self._score_job(*request) for request in requests)
        return self._results(
            "loglikelihood",
            [pair for pair, _, _ in requests],
            jobs,
            lambda score: (score.total, score.is_greedy),
            disable_tqdm,
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [request.args for request in requests]
        # Like `hf`: a prefix token, then the text, which has a prefix token of its own.
        jobs = (
            self.llm.perplexity_job([self.prefix_token_id, *self.tok_encode(text)])
            for (text,) in texts
        )
        return self._results(
            "loglikelihood_rolling", texts, jobs, lambda found: found.total, disable_tqdm
        )

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        arguments = [request.args for request in requests]
        # All jobs are made before the first runs, so that a bad argument is reported at once.
        jobs = [self._generate_job(*each) for each in arguments]
        return self._results("generate_until", arguments, jobs, _text, disable_tqdm)

    def _results[T, R](
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...]],
        jobs: Iterable[Job[T]],
        result: Callable[[T], R],
        disable_tqdm: bool,
    ) -> list[R]:
        """Return the results of a method in order, and put each into the harness's cache at
        once."""
        source = run_jobs(self.llm.engine, jobs)
        progress = tqdm(source, method, total=len(arguments), disable=disable_tqdm)
        results = []
        for each, found in zip(arguments, progress, strict=True):
            results.append(result(found))
            self.cache_hook.add_partial(method, each, results[-1])
        return results

    def _score_job(
        self, pair: tuple[str, str], context: list[int], continuation: list[int]
    ) -> Job[Any]:
        count = len(continuation)
        if not 1 <= count <= self.max_length:
            raise ValueError(
                f"the continuation {pair[1]!r:.200} has {count} tokens after {pair[0][-100:]!r}: "
                f"between 1 and {self.max_length} (max_seq_len - 1) are possible"
            )
        kept = (context + continuation)[-self.llm.max_seq_len :]
        return self.llm.score_job(kept[:-count], continuation)

    def _generate_job(self, context: str, generation_kwargs: dict[str, Any]) -> Job[Generation]:
        sampling = self._sampling(generation_kwargs)
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks {sampling.max_new_tokens} leaves no room for a prompt among "
                f"{self.max_length} tokens: lower it, or load the model with a larger max_seq_len"
            )
        return self.llm.generate_job(self.tok_encode(context)[-room:], sampling)

    def _sampling(self, generation_kwargs: dict[str, Any]) -> SamplingParams:
        given = dict(normalize_gen_kwargs(generation_kwargs, self.max_gen_toks))
        until = [text for text in given.pop("until") if text]
        max_new_tokens, temperature = given.pop("max_gen_toks"), given.pop("temperature", 0.0)
        del given["do_sample"]
        if given.get("num_beams") == 1:
            del given["num_beams"]
        if unknown := sorted(given.keys() - _SAMPLING):
            raise ValueError(
                f"generation_kwargs: {unknown[0]} is not supported; besides until, do_sample, "
                f"temperature and max_gen_toks there are {', '.join(sorted(_SAMPLING))}"
            )
        return replace(
            self.llm.default_sampling,
            max_new_tokens=max_new_tokens,
            temperature=float(temperature),
            stop=until,
            # The harness seeds numpy, so its --seed repeats a run.
            seed=int(np.random.randint(2**32)) if temperature else 0,
            **given,
        )


def _text(reply: Generation) -> str:
    if reply.error:
        raise reply.error
    return reply.text


if __name__ == "__main__":
    cli_evaluate()
