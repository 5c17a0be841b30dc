"""This module makes the metrics of /metrics.

Names and buckets are those of vLLM's old and new versions, so that its dashboards work; a few are
our own.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from llama_jax.engine.request import Request
from llama_jax.model.config import PAGE_SIZE
from llama_jax.serve.engine_thread import EngineThread

_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
PER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_WHOLE = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_PER_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_N = (1, 2, 5, 10, 20)
# What vLLM called these until 2025, as dashboards still do.
_OLDER_NAMES = {
    b"vllm:inter_token_latency_seconds": b"vllm:time_per_output_token_seconds",
    b"vllm:kv_cache_usage_perc": b"vllm:gpu_cache_usage_perc",
}
_REASONS = ("stop", "length", "abort", "error")
_ENGINE = "0"  # vLLM's label, for servers with several


class Metrics:
    """Counts requests. Figures of the engine are read from its thread on demand."""

    def __init__(self, name: str, max_seq_len: int, thread: EngineThread) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(name, thread))
        self._labels = name, _ENGINE
        tokens = _one_two_five(max_seq_len)

        def histogram(name: str, help: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(
                f"vllm:{name}", help, ["model_name", "engine"], buckets=list(buckets),
                registry=self.registry,
            )  # fmt: skip
            return made.labels(*self._labels)

        self._success = Counter(
            "vllm:request_success", "Requests that ended, by how.",
            ["model_name", "engine", "finished_reason"], registry=self.registry,
        )  # fmt: skip
        for reason in _REASONS:  # so that the first of each is an increase
            self._success.labels(*self._labels, reason)
        self.failures = Counter(
            "llama_jax:request_failures",
            "HTTP requests without an answer: rejected or timeout.",
            ["model_name", "reason"], registry=self.registry,
        )  # fmt: skip
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", tokens)
        self._generation = histogram("request_generation_tokens", "Tokens of a reply.", tokens)
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens asked for.", tokens)
        self._longest = histogram(
            "request_max_num_generation_tokens", "Tokens of the longest of n replies.", tokens
        )
        self._n = histogram("request_params_n", "n asked for.", _N)
        self._per_step = histogram("iteration_tokens_total", "Tokens of a step.", _PER_STEP)
        self._first = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN
        )
        self._between = TokenIntervals(self._labels)
        self.registry.register(self._between)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Mean of a request.", PER_TOKEN
        )
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", _WHOLE)
        self._queued = histogram("request_queue_time_seconds", "Until a row was free.", _WHOLE)
        self._inference = histogram("request_inference_time_seconds", "In a row.", _WHOLE)
        self._prefill = histogram("request_prefill_time_seconds", "Until the first token.", _WHOLE)
        self._decode = histogram("request_decode_time_seconds", "After the first token.", _WHOLE)

    def step(self, tokens: int) -> None:
        """Counts the tokens that the engine computed in a step."""
        self._per_step.observe(tokens)

    def asked(self, requests: Sequence[Request]) -> None:
        """Counts the continuations that one HTTP request asks for."""
        self._n.observe(len(requests))
        self._max_tokens.observe(requests[0].params.max_new_tokens if requests else 0)

    def piece(self, seconds: float, tokens: int) -> None:
        """Counts the time that a stream waited for some tokens."""
        self._between.observe(seconds, tokens)

    def request(self, request: Request, began: float) -> None:
        """Counts a sequence that has ended. began: the time at which its HTTP request arrived.

        Those of a client that left, or of a deadline, are aborted: vLLM has this label for them,
        though its own count stays at 0 (vLLM's issue 31503). No histogram of times has them.
        """
        reason = {"cancelled": "abort"}.get(str(request.finish_reason), str(request.finish_reason))
        self._success.labels(*self._labels, reason).inc()
        if not request.admitted_at:
            return
        first = request.first_token_at or request.finished_at
        self._prompt.observe(len(request.prompt))
        self._queued.observe(max(0.0, request.admitted_at - began))
        if not first or request.finish_reason in ("cancelled", "error"):
            return
        self._first.observe(first - began)
        self._whole.observe(request.finished_at - began)
        self._inference.observe(request.finished_at - request.admitted_at)
        self._prefill.observe(first - request.admitted_at)
        count = len(request.token_ids)
        if count:
            self._generation.observe(count)
            self._decode.observe(request.finished_at - first)
        if count > 1:
            self._per_token.observe((request.finished_at - first) / (count - 1))

    def ended(self, requests: Sequence[Request]) -> None:
        """Counts the continuations of one HTTP request once the last has ended."""
        if longest := max((len(request.token_ids) for request in requests), default=0):
            self._longest.observe(longest)

    def exposition(self) -> bytes:
        """Returns all metrics in Prometheus' text format, some under two names."""
        text = generate_latest(self.registry)
        older = [
            line.replace(name, before)
            for name, before in _OLDER_NAMES.items()
            for line in text.splitlines(keepends=True)
            if name in line
        ]
        return text + b"".join(older)


class TokenIntervals(Collector):
    """Counts the time for each token of each stream. prometheus-client's histogram would take
    longer for it than the rest of the token's way to the socket but the write."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._counts = [0] * (len(PER_TOKEN) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, tokens: int) -> None:
        self._counts[bisect_left(PER_TOKEN, seconds / tokens)] += tokens
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        made = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Between two pieces of a stream, per token.",
            labels=["model_name", "engine"],
        )  # fmt: skip
        bounds = [*(str(float(each)) for each in PER_TOKEN), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        made.add_metric(self._labels, buckets, self._sum)
        yield made


class _EngineCollector(Collector):
    """Exports the engine's counters, as they are between two steps."""

    def __init__(self, name: str, thread: EngineThread) -> None:
        self._labels = [name, _ENGINE]
        self._thread = thread

    def collect(self) -> Iterator[Metric]:
        seen = self._thread.snapshot
        stats = seen.stats
        gauges = (
            ("vllm:num_requests_running", "Sequences in rows of the engine.", seen.num_running),
            ("vllm:num_requests_waiting", "Sequences that wait for a row.", seen.num_waiting),
            ("vllm:kv_cache_usage_perc", "Of the cache's pages, in use; 1 is all.",
             seen.pages_used / seen.num_pages),
        )  # fmt: skip
        counters = (
            ("vllm:prefix_cache_queries", "Tokens looked for in the cache.", stats.queried),
            ("vllm:prefix_cache_hits", "Tokens found in the cache.", stats.hit),
            ("vllm:num_preemptions", "Sequences that gave their pages back.", stats.preempted),
            ("vllm:prompt_tokens", "Prompt tokens computed.", stats.prefilled),
            ("vllm:generation_tokens", "Tokens drawn.", stats.drawn),
            ("vllm:spec_decode_num_draft_tokens", "Draft tokens proposed.", stats.drafted),
            ("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.", stats.accepted),
            ("llama_jax:compiled_programs", "Since the warm-up; has to stay 0.", seen.compiled),
            ("llama_jax:engine_steps", "Steps of the engine.", seen.steps),
            ("llama_jax:device_wait_seconds", "Spent waiting for the device.", stats.waited),
        )
        for name, help, value in gauges:
            gauge = GaugeMetricFamily(name, help, labels=["model_name", "engine"])
            gauge.add_metric(self._labels, value)
            yield gauge
        config = GaugeMetricFamily(
            "vllm:cache_config_info", "Of the cache.",
            labels=["model_name", "engine", "block_size", "num_gpu_blocks"],
        )  # fmt: skip
        config.add_metric([*self._labels, str(PAGE_SIZE), str(seen.num_pages)], 1)
        yield config
        for name, help, value in counters:
            counter = CounterMetricFamily(name, help, labels=["model_name", "engine"])
            counter.add_metric(self._labels, value)
            yield counter


def _one_two_five(most: int) -> list[float]:
    """Returns 1, 2, 5, 10, 20, 50, ... up to `most`."""
    found: list[float] = []
    scale = 1
    while True:
        for factor in (1, 2, 5):
            if factor * scale > most:
                return found
            found.append(factor * scale)
        scale *= 10
