"""Runs this and other engines on the same random Llama, for `cpu_against_peers.py`.

All matrices are taken from one ring of random numbers, so that the engines have the same model up
to the rounding of their formats: FP8 with a scale per row here, int8 with a scale per 32 weights
(llama.cpp's Q8_0) or per row (OpenVINO), bfloat16, float32. The ring's length is a prime number of
blocks of 32, so that no two rows of a matrix are equal.
"""

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llama_jax.model.config import PAGE_SIZE, PRESETS, LlamaConfig
from llama_jax.model.rope import rope_frequencies

SMALL: LlamaConfig = PRESETS["llama-3.2-1b"]
CONFIG = SMALL  # unless `use` says otherwise
THREADS = 2
BLOCK = 32  # of Q8_0
_BLOCKS, _SPREAD = 131_071, 0.02
OPENVINO_FILE = "openvino.xml"
CONTEXT = 64  # tokens before the decoded ones
PROMPT = 512  # tokens to prefill or score
BATCHES = (1, 8)


def use(preset: str) -> None:
    """Give all engines the shape of another preset."""
    global CONFIG
    CONFIG = PRESETS[preset]


def preset() -> str:
    """Return the name of the shape."""
    return next(name for name, config in PRESETS.items() if config is CONFIG)


class Engine(Protocol):
    """An engine that times its own work. Prompts are int64 arrays of token ids."""

    def decode(self, batch: int, steps: int) -> float:
        """Return the seconds of a step that draws the likeliest token of each of `batch`
        sequences."""

    def prefill(self, prompt: np.ndarray) -> float:
        """Return the seconds until the first token after the prompt is known."""

    def score(self, prompt: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the seconds, and the logprobs of all tokens of the prompt but the first."""


def prompts(batch: int, tokens: int) -> np.ndarray:
    """Draw prompts, int64 [batch, tokens]."""
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (batch, tokens))


# --- The weights.


def ring() -> np.ndarray:
    """Make the ring, float32 [_BLOCKS, BLOCK], of values that bfloat16 can represent."""
    numbers = np.random.default_rng(1).standard_normal((_BLOCKS, BLOCK), np.float32) * _SPREAD
    return (numbers.view(np.uint32) & 0xFFFF0000).view(np.float32)


def num_weights(config: LlamaConfig | None = None) -> int:
    """Return how many weights all matrices have together."""
    return sum(shape[0] * shape[-1] for shape in shapes(config).values() if len(shape) == 2)


def shapes(config: LlamaConfig | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by Hugging Face's name; vectors are all ones."""
    c = config or CONFIG
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    matrices = {
        "self_attn.q_proj": (q, c.hidden_size), "self_attn.k_proj": (kv, c.hidden_size),
        "self_attn.v_proj": (kv, c.hidden_size), "self_attn.o_proj": (c.hidden_size, q),
        "mlp.gate_proj": (c.intermediate_size, c.hidden_size),
        "mlp.up_proj": (c.intermediate_size, c.hidden_size),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size),
    }  # fmt: skip
    norms = {"input_layernorm": (c.hidden_size,), "post_attention_layernorm": (c.hidden_size,)}
    for layer in range(c.num_layers):
        for name, shape in (matrices | norms).items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
    if not c.tie_word_embeddings:
        found["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return found | {"model.norm.weight": (c.hidden_size,)}


def fill(into: np.ndarray, of_ring: np.ndarray, name: str) -> np.ndarray:
    """Fill a parameter from a ring in some format, [_BLOCKS, ...]."""
    blocks = into.reshape(-1, *of_ring.shape[1:])
    position = list(shapes()).index(name) * 7919 % _BLOCKS
    done = 0
    while done < len(blocks):
        part = of_ring[position : position + len(blocks) - done]
        blocks[done : done + len(part)] = part
        done, position = done + len(part), 0
    return into


# --- This engine.


def our_spec() -> Any:
    """Return a spec with the embedding, which is also the output matrix, in FP8: llama.cpp and
    OpenVINO hold theirs in int8."""
    from llama_jax import bench

    return bench.preset_spec(CONFIG, quantize_lm_head=True)


class LlamaJax:
    def __init__(self, directory: Path) -> None:
        import sys

        # As if jax were installed for a CPU: the GPU's libraries would take 0.36 GB.
        for name in ("jax_plugins.xla_cuda13", "jax_cuda13_plugin"):
            sys.modules[name] = None  # type: ignore[assignment]
        import jax

        from llama_jax.engine import compile_cache
        from llama_jax.engine.allocator import keep_little

        keep_little()  # as the commands do
        compile_cache.enable()
        self.spec = our_spec()
        self.params = self._params()
        self.engines: dict[int, Any] = {}
        self.prefills = 0
        jax.block_until_ready(self.params)

    def _params(self) -> Any:
        import jax
        import jax.numpy as jnp

        from llama_jax.checkpoint.huge_pages import Room
        from llama_jax.model.params import abstract_params

        numbers, abstract = ring(), abstract_params(self.spec)
        scale = _SPREAD / 64
        codes = (numbers / scale).astype(jnp.float8_e4m3fn).view(np.int8)
        half = numbers.astype(jnp.bfloat16)
        room = Room(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))

        def make(path: tuple[Any, ...], leaf: Any) -> Any:
            keys = [key.key.replace("layers_", "layers.") for key in path]
            if keys[-1] == "weight" and len(leaf.shape) == 2:
                of_ring = codes if leaf.dtype.itemsize == 1 else half
                name = ".".join(keys if keys[0] == "lm_head" else ["model", *keys])
                found = fill(room.empty(leaf.shape, of_ring.dtype), of_ring, name)
                return jax.device_put(found, may_alias=True)
            return jnp.full(leaf.shape, scale if keys[-1] == "weight_scale" else 1, leaf.dtype)

        return jax.tree_util.tree_map_with_path(make, abstract)

    def _engine(self, batch: int) -> Any:
        """Return the engine of a batch size. That of batch 1 also computes prompts."""
        import jax.numpy as jnp

        from llama_jax.engine.engine import Engine
        from llama_jax.engine.scheduling import EngineOptions

        if batch not in self.engines:
            length = PROMPT + CONTEXT if batch == 1 else 2 * CONTEXT
            # Pages of prompts of `CONTEXT` tokens are kept while sequences append to their own.
            pages = -(-length // PAGE_SIZE) * batch + CONTEXT // PAGE_SIZE * batch
            options = EngineOptions(max_batch_size=batch, max_seq_len=length, num_pages=pages)
            self.engines[batch] = Engine(self.params, self.spec, options, jnp.dtype("bfloat16"))
        return self.engines[batch]

    def decode(self, batch: int, steps: int) -> float:
        """Time two output lengths and take the difference. Prompts are computed once, because later
        runs share their pages."""
        from llama_jax import bench

        engine = self._engine(batch)
        sizes = bench.Workload(batch, CONTEXT, steps + 9)
        bench.run_once(engine, sizes, 1)
        short, long = (bench.run_once(engine, sizes, n).seconds for n in (9, steps + 9))
        return (long - short) / steps

    def prefill(self, prompt: np.ndarray) -> float:
        from llama_jax.engine.request import Request
        from llama_jax.sampling_params import SamplingParams

        self.prefills += 1
        other = np.roll(prompt, self.prefills)  # so that no page of an earlier prompt is shared
        greedy = SamplingParams(temperature=0.0, seed=0, max_new_tokens=1)
        return self._run(Request(other.tolist(), greedy))

    def score(self, prompt: np.ndarray) -> tuple[float, np.ndarray]:
        from llama_jax.engine.request import Request

        request = Request(prompt.tolist(), output_kind="logprobs")
        return self._run(request), request.prompt_logprobs

    def _run(self, request: Any) -> float:
        engine = self._engine(1)
        began = time.perf_counter()
        for _ in engine.run([request]):
            pass
        return time.perf_counter() - began


# --- Engines that return logits.


class ByLogits(ABC):
    """An engine whose `begin` starts empty sequences and whose `extend` appends to all of them.

    `extend` takes int64 [batch, tokens] and returns the likeliest next token of each, int64
    [batch]. `logprobs` takes [tokens] and returns those of all but the first.
    """

    def __init__(self) -> None:
        self._batch = 0
        self._last = np.zeros(0, np.int64)

    @abstractmethod
    def begin(self, batch: int) -> None: ...

    @abstractmethod
    def extend(self, tokens: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def logprobs(self, tokens: np.ndarray) -> np.ndarray: ...

    def decode(self, batch: int, steps: int) -> float:
        self.begin(batch)
        last = self.extend(prompts(batch, CONTEXT))
        began = time.perf_counter()
        for _ in range(steps):
            last = self.extend(last[:, None])
        return (time.perf_counter() - began) / steps

    def prefill(self, prompt: np.ndarray) -> float:
        self.begin(1)
        began = time.perf_counter()
        self.extend(prompt[None])
        return time.perf_counter() - began

    def score(self, prompt: np.ndarray) -> tuple[float, np.ndarray]:
        self.begin(1)
        began = time.perf_counter()
        found = self.logprobs(prompt)
        return time.perf_counter() - began, found


class Transformers(ByLogits):
    def __init__(self, directory: Path, *, dtype: str) -> None:
        super().__init__()
        import torch
        from transformers import AutoModelForCausalLM
        from transformers import LlamaConfig as HFConfig
        from transformers.initialization import no_init_weights

        torch.set_num_threads(THREADS)
        torch.set_grad_enabled(False)
        with no_init_weights():
            self.model = AutoModelForCausalLM.from_config(
                HFConfig.from_dict(CONFIG.to_hf()), dtype=getattr(torch, dtype)
            ).eval()
        of_ring = torch.from_numpy(ring()).to(getattr(torch, dtype))
        as_bits = {"bfloat16": torch.int16, "float32": torch.float32}[dtype]
        self.model.tie_weights()
        for name, parameter in self.model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                fill(parameter.view(as_bits).numpy(), of_ring.view(as_bits).numpy(), name)

    def begin(self, batch: int) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache()

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        import torch

        logits = self.model(
            torch.from_numpy(tokens), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits[:, -1].argmax(-1).numpy()

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        import torch

        ids = torch.from_numpy(tokens)
        found = torch.log_softmax(self.model(ids[None], use_cache=False).logits[0, :-1].float(), -1)
        return found.gather(1, ids[1:, None])[:, 0].numpy()


class LlamaCpp(ByLogits):
    def __init__(self, directory: Path, *, file: str) -> None:
        super().__init__()
        import llama_cpp

        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        # Read into memory, which may be in huge pages and is then a quarter faster, not mapped.
        if hasattr(options, "load_mode"):
            options.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        else:
            options.use_mmap = False
        self.model = llama_cpp.llama_model_load_from_file(str(directory / file).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {file}")
        self.context: Any = None
        self.capacity = 0

    def begin(self, batch: int) -> None:
        lib = self.lib
        if self.context is None:
            options = lib.llama_context_default_params()
            options.n_ctx = max(BATCHES) * 2 * CONTEXT + PROMPT
            options.n_batch = options.n_ubatch = max(BATCHES) * CONTEXT
            options.n_seq_max = max(BATCHES)
            options.n_threads = options.n_threads_batch = THREADS
            options.kv_unified = True
            self.context = lib.llama_init_from_model(self.model, options)
            self.batch = lib.llama_batch_init(options.n_batch, 0, 1)
        memory = lib.llama_get_memory(self.context)
        for sequence in range(max(BATCHES)):
            lib.llama_memory_seq_rm(memory, sequence, -1, -1)
        self.length = 0

    def _logits(self, tokens: np.ndarray, of_all: bool) -> np.ndarray:
        """Return float32 logits, a row for each sequence, or with of_all for each token."""
        batch, (rows, count) = self.batch, tokens.shape
        for row in range(rows):
            for i in range(count):
                at = row * count + i
                batch.token[at], batch.pos[at] = int(tokens[row, i]), self.length + i
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = of_all or i == count - 1
        batch.n_tokens = rows * count
        if status := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode: {status}")
        self.length += count
        outputs = rows * count if of_all else rows
        found = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (outputs, CONFIG.vocab_size))

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        return self._logits(tokens, False).argmax(-1)

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        return _logprobs(self._logits(tokens[None], True)[:-1], tokens[1:])


class OpenVINO(ByLogits):
    def __init__(self, directory: Path) -> None:
        super().__init__()
        import openvino as ov

        core = ov.Core()
        options = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
        model = core.compile_model(directory / OPENVINO_FILE, "CPU", options)
        self.request = model.create_infer_request()

    def begin(self, batch: int) -> None:
        self.request.reset_state()
        self.length = 0

    def _logits(self, tokens: np.ndarray, of_all: bool) -> np.ndarray:
        batch, count = tokens.shape
        self.request.infer({
            "input_ids": tokens,
            "position_ids": np.tile(np.arange(self.length, self.length + count), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32),
            "selected": np.arange(count) if of_all else np.array([count - 1]),
        })  # fmt: skip
        self.length += count
        found: np.ndarray = self.request.get_output_tensor(0).data
        return found

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        return self._logits(tokens, False)[:, -1].argmax(-1)

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        return _logprobs(self._logits(tokens[None], True)[0, :-1], tokens[1:])


def _logprobs(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the logprobs of tokens [n] by logits [n, vocab]."""
    logits = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, tokens[:, None], -1)[:, 0]
    return chosen - np.log(np.exp(logits, out=logits).sum(-1))


# --- llama.cpp's file. OpenVINO's is made in `cpu_openvino.py`.

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
}  # fmt: skip


def write_gguf(directory: Path, *, file: str) -> None:
    """Write llama.cpp's file, with matrices in the format in its name, without a vocabulary."""
    import gguf

    kind = gguf.GGMLQuantizationType[Path(file).stem]
    of_ring = gguf.quants.quantize(ring(), kind)  # [_BLOCKS, bytes]
    writer = gguf.GGUFWriter(directory / file, "llama", use_temp_file=False)
    c = CONFIG
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    plain = np.float32(c.rope_theta) ** -(np.arange(0, c.head_dim, 2) / np.float32(c.head_dim))
    writer.add_tensor("rope_freqs.weight", (plain / rope_frequencies(c)).astype(np.float32))
    for name, shape in shapes().items():
        found = name
        for theirs, ours in _GGUF_NAMES.items():
            found = found.replace(theirs, ours)
        if len(shape) == 1:
            writer.add_tensor(found, np.ones(shape, np.float32))
            continue
        row_bytes = shape[1] // BLOCK * of_ring.shape[1]
        matrix = fill(np.empty((shape[0], row_bytes), np.uint8), of_ring.view(np.uint8), name)
        if "q_proj" in name or "k_proj" in name:  # rotary pairs next to each other
            pairs = matrix.reshape(-1, 2, c.head_dim // 2, row_bytes)
            matrix = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(shape[0], row_bytes)
        writer.add_tensor(found, matrix, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
