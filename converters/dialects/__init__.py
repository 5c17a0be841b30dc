"""Lists the layouts that can be read. A new one is a module here and an entry in `DIALECTS`."""

import re
from collections import Counter

from flax import traverse_util

from converters.dialects.autofp8 import AUTOFP8
from converters.dialects.compressed_tensors import COMPRESSED_TENSORS
from converters.dialects.dense import DENSE
from converters.dialects.fbgemm import FBGEMM
from converters.dialects.finegrained import FINEGRAINED
from converters.dialects.friendli import FRIENDLI
from converters.dialects.layout import Dialect, Plan
from converters.dialects.meta import META
from converters.dialects.modelopt import MODELOPT
from converters.dialects.torchao import TORCHAO
from converters.safetensors_reader import ROTARY_CONSTANT
from converters.source import Source, same_bytes
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.json_file import shown
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec

DIALECTS: tuple[Dialect, ...] = (
    DENSE, FRIENDLI, AUTOFP8, COMPRESSED_TENSORS, FBGEMM, MODELOPT, FINEGRAINED, TORCHAO, META,
)  # fmt: skip
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_UNSUPPORTED = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "mxfp4": "MXFP4"}


def make_plan(source: Source) -> tuple[Plan, str]:
    """Plan a checkpoint: all modules of the model with the sources of their arrays.

    Returns the plan and the dialect's name.
    Raises `CheckpointError` if a tensor is missing, malformed or superfluous.
    """
    dialect = detect(source)
    _check_layers(source)
    tree = traverse_util.flatten_dict(abstract_params(ModelSpec(source.config)))
    weights = {"/".join(path[:-1]): leaf.shape for path, leaf in tree.items()}
    plan = dialect.plan(source, weights)
    unused = {
        name for name in source.tensors.keys() - plan.used if not ROTARY_CONSTANT.search(name)
    }
    if source.config.tie_word_embeddings and "lm_head.weight" in unused:
        _check_tied(source)
        unused.remove("lm_head.weight")
    if unused:
        others = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
        raise CheckpointError(
            f"{min(unused)}{others} has no place in a {dialect.name} checkpoint of "
            f"{source.config.num_layers} layers. The config and the weights do not belong "
            "together, or this variant is not supported."
        )
    return plan, dialect.name


def detect(source: Source) -> Dialect:
    """Return the one dialect that applies to a checkpoint's configs and tensors.

    Raises `CheckpointError`, which says what was found and what is supported, if none or several
    apply.
    """
    fitting = [dialect for dialect in DIALECTS if dialect.applies(source)]
    if len(fitting) == 1:
        return fitting[0]
    supported = ", ".join(dialect.name for dialect in DIALECTS)
    method = str(source.quantization.get("quant_method"))
    packed = any(name.endswith(".qweight") for name in source.tensors)
    what = _UNSUPPORTED.get(method, "GPTQ or AWQ" if packed else "this")
    raise CheckpointError(
        f"{what} is a layout that is not supported. Take an FP8 "
        "checkpoint of the model, or the unquantised one with --quantize row.\n"
        f"Found: {_found(source)}.\nSupported: {supported}."
    )


def _check_layers(source: Source) -> None:
    """Compare the config's number of layers with the tensors before anything is built for each.

    A config may ask for a billion of them.
    """
    numbers = (match for name in source.tensors if (match := _LAYER.search(name)))
    stored = len({match[1] for match in numbers})
    if stored < source.config.num_layers:
        raise CheckpointError(
            f"{source.directory}: the config says {source.config.num_layers} layers, the weights "
            f"have {stored}. They do not belong together, or a file is missing."
        )


def _check_tied(source: Source) -> None:
    head, embedding = (source.tensors[f"{x}.weight"] for x in ("lm_head", "model.embed_tokens"))
    if not same_bytes(head, embedding):
        raise CheckpointError(
            "lm_head.weight differs from model.embed_tokens.weight although the config says "
            "tie_word_embeddings. Set it to false if lm_head is meant to be used."
        )


def _found(source: Source) -> str:
    plain = [
        f"{k} = {shown(v)}" for k, v in source.quantization.items() if isinstance(v, str | int)
    ]
    dtypes = Counter(
        tensor.dtype.name for name, tensor in source.tensors.items() if name.endswith("weight")
    )
    leaves = Counter(
        name.rpartition(".")[2]
        for name in source.tensors
        if not name.endswith((".weight", "inv_freq"))
    )
    return "; ".join(
        [
            f"quantization_config with {', '.join(plain[:8])}"
            if plain
            else "no quantization_config",
            "weights " + (", ".join(f"{n} x {dtype}" for dtype, n in dtypes.items()) or "none"),
            "beside them " + (", ".join(sorted(leaves)[:8]) or "nothing"),
        ]
    )
