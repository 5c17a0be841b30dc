"""Checkpoints of a tiny Llama in each supported layout, written byte by byte."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.safetensors_reader import DTYPES

Arrays = dict[str, np.ndarray]
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "eos_token_id": [2, 3],
}
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (160, 64),
    "mlp.up_proj": (160, 64),
    "mlp.down_proj": (64, 160),
}
LINEARS = {
    f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in SHAPES.items()
}


def dense(dtype: Any = ml_dtypes.bfloat16) -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {f"{name}.weight": shape for name, shape in LINEARS.items()}
    shapes |= {"model.embed_tokens.weight": (96, 64), "lm_head.weight": (96, 64)}
    norms = ["model.norm.weight"] + [
        f"model.layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    arrays = {name: rng.normal(0, 0.1, shape).astype(dtype) for name, shape in shapes.items()}
    return arrays | {name: np.ones(64, dtype) for name in norms}


def friendli(dynamic: bool = False) -> Arrays:
    """Return random finite e4m3fn bits as int8, with different scales for every matrix."""
    rng = np.random.default_rng(1)
    finite = np.setdiff1d(np.arange(256), [0x7F, 0xFF]).astype(np.uint8)
    arrays = dense()
    for name, shape in LINEARS.items():
        arrays[f"{name}.weight"] = rng.choice(finite, shape).view(np.int8)
        if dynamic:
            scale = rng.uniform(1e-4, 1e-3, (shape[0], 1)).astype(ml_dtypes.bfloat16)
            arrays[f"{name}.zeros"] = np.zeros((shape[0], 1), ml_dtypes.float8_e4m3fn)
        else:
            scale = np.array(rng.uniform(1e-4, 1e-3), np.float32)
            arrays[f"{name}.in_scale"] = np.array(rng.uniform(0.01, 0.1), np.float32)
        arrays[f"{name}.weight_scale"] = scale
    return arrays


def quantized(scheme: str) -> dict[str, Any]:
    return {"quantization_config": {"activation_scheme": scheme, "quant_method": "fp8"}}


FRIENDLI_03 = {"fmo_version": "0.3", "use_fp8_e4m3": True}
FRIENDLI_05 = {"fmo_version": "0.5", "use_fp8_e4m3": True, **quantized("static")}
FRIENDLI_DYNAMIC = quantized("dynamic")

Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
SCALE_SHAPES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "scalar": lambda rows, columns: (),
    "one": lambda rows, columns: (1,),
    "one by one": lambda rows, columns: (1, 1),
    "rows": lambda rows, columns: (rows,),
    "column": lambda rows, columns: (rows, 1),
    "blocks": lambda rows, columns: (-(-rows // 128), -(-columns // 128)),
    "spread blocks": lambda rows, columns: (-(-rows // 128), 1, -(-columns // 128), 1),
}


@dataclass(frozen=True)
class Variant:
    """A checkpoint as some tool writes it. Matrices have random FP8 codes, except those in `plain`,
    and all scales differ.

    scale: the shape of weight scales, a key of `SCALE_SHAPES`. weight, weight_scale, input_scale:
    names within a module. cache_scales: names within `self_attn` of the scales of k and v, and
    further ones. files: JSON files of the directory. activation_group: see `WeightFormat`.
    """

    dialect: str
    config: Mapping[str, Any]
    scale: str = "scalar"
    scale_dtype: Any = np.float32
    weight: str = "weight"
    weight_scale: str = "weight_scale"
    input_scale: str | None = None
    cache_scales: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    files: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    activation_group: int | None = None
    cache_scale_shape: tuple[int, ...] = (1,)

    def arrays(self) -> Arrays:
        rng = np.random.default_rng(2)
        finite = np.setdiff1d(np.arange(256), [0x7F, 0xFF]).astype(np.uint8)
        arrays = dense()

        def scales(shape: tuple[int, ...]) -> np.ndarray:
            if self.scale_dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
                return rng.integers(110, 130, shape).astype(np.uint8).view(self.scale_dtype)
            return rng.uniform(1e-4, 1e-3, shape).astype(self.scale_dtype)

        for name, (rows, columns) in LINEARS.items():
            if name in self.plain:
                continue
            del arrays[f"{name}.weight"]
            codes = rng.choice(finite, (rows, columns)).view(ml_dtypes.float8_e4m3fn)
            arrays[f"{name}.{self.weight}"] = codes
            arrays[f"{name}.{self.weight_scale}"] = scales(SCALE_SHAPES[self.scale](rows, columns))
            if self.input_scale:
                shape = (1,) if self.scale == "one" else ()
                arrays[f"{name}.{self.input_scale}"] = scales(shape)
        for layer in range(2):
            for leaf in self.cache_scales:
                values = rng.uniform(0.01, 0.1, self.cache_scale_shape).astype(np.float32)
                arrays[f"model.layers.{layer}.self_attn.{leaf}"] = values
        return arrays

    def write(self, directory: Path, arrays: Arrays | None = None, **options: Any) -> Path:
        arrays = self.arrays() if arrays is None else arrays
        files, metadata = dict(self.files), dict(self.metadata)
        return write(
            directory, arrays, self.config, **({"files": files, "metadata": metadata} | options)
        )


def autofp8(scheme: str, **changes: Any) -> dict[str, Any]:
    fields = {"quant_method": "fp8", "activation_scheme": scheme, "ignored_layers": ["lm_head"]}
    return {"quantization_config": fields | changes}


def finegrained(**changes: Any) -> dict[str, Any]:
    fields = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    return {"quantization_config": fields | changes}


def numbers(strategy: str, **changes: Any) -> dict[str, Any]:
    """Return compressed-tensors' description of 8-bit floats, as version 0.14 writes it."""
    fields = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": None,
        "num_bits": 8, "observer": "memoryless_minmax", "observer_kwargs": {}, "scale_dtype": None,
        "strategy": strategy, "symmetric": True, "type": "float", "zp_dtype": None,
    }  # fmt: skip
    return fields | changes


TOKEN = numbers("token", dynamic=True, observer=None)
IN_GROUPS = numbers("group", dynamic=True, group_size=128)
IN_BLOCKS = numbers("block", block_structure=[128, 128])


def group(weights: Any, inputs: Any, targets: tuple[str, ...] = ("Linear",), **changes: Any) -> Any:
    fields = {"weights": weights, "input_activations": inputs, "targets": list(targets)}
    return {"format": "float-quantized", "output_activations": None} | fields | changes


def compressed(*groups: Any, **changes: Any) -> dict[str, Any]:
    fields = {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{i}": each for i, each in enumerate(groups)},
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }
    return {"quantization_config": fields | changes}


def fbgemm(plain: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    fields = {"activation_scale_ub": 1200.0, "modules_to_not_convert": plain}
    return {"quantization_config": {"quant_method": "fbgemm_fp8"} | fields | changes}


def modelopt(algorithm: str = "FP8", **changes: Any) -> dict[str, Any]:
    fields = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    return {"quantization_config": fields | changes}


def modelopt_file(algorithm: str = "FP8", **changes: Any) -> dict[str, Any]:
    fields = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    producer = {"name": "modelopt", "version": "0.47.0"}
    return {"hf_quant_config.json": {"producer": producer, "quantization": fields | changes}}


MODELOPT_GROUPS = {
    "group_0": {
        "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
        "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
        "targets": ["Linear"],
    }
}
MODELOPT_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}


def torchao(kind: str = "Float8DynamicActivationFloat8WeightConfig", **changes: Any) -> Any:
    quant_type = {"default": {"_type": kind, "_version": 2, "_data": {"granularity": []}}}
    fields = {
        "quant_type": quant_type,
        "include_input_output_embeddings": False,
        "modules_to_not_convert": None,
        "untie_embedding_weights": False,
    }
    return {"quantization_config": {"quant_method": "torchao"} | fields | changes}


def torchao_metadata(
    per_row: bool = False, plain: tuple[str, ...] = (), blocks: bool = False
) -> dict[str, str]:
    described = {}
    granularity = {"_type": "PerBlock", "_data": {"block_size": [1, 128]}} if blocks else None
    for name, (rows, columns) in LINEARS.items():
        block_size = [1, columns] if per_row else [rows, columns]
        data = {
            "block_size": [128, 128] if blocks else block_size,
            "act_quant_kwargs": {
                "_type": "QuantizeTensorToFloat8Kwargs",
                "_data": {"granularity": granularity},
            },
            "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
        }
        float8 = {"_type": "Float8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]}
        described[f"{name}.weight"] = {"_type": "Tensor"} if name in plain else float8
    described["lm_head.weight"] = {"_type": "Tensor"}
    return {key: json.dumps(value) for key, value in described.items()} | {"tensor_names": "[]"}


ATTENTION = [
    tuple(f"model.layers.{layer}.self_attn.{x}_proj" for x in "qkvo") for layer in range(2)
]
VARIANTS = {
    "autofp8 static": Variant("autofp8", autofp8("static"), input_scale="input_scale"),
    "autofp8 dynamic": Variant("autofp8", autofp8("dynamic"), scale="one"),
    "autofp8, blocks named and none": Variant(
        "autofp8", autofp8("dynamic", weight_block_size=None)
    ),
    "autofp8 with cache scales": Variant(
        "autofp8",
        autofp8("static", kv_cache_scheme="static", ignored_layers=["lm_head", DOWN]),
        input_scale="input_scale",
        cache_scales=("k_scale", "v_scale"),
        plain=(DOWN,),
    ),
    "autofp8 of May 2024": Variant(
        "autofp8",
        autofp8("static", kv_cache_scheme="static"),
        input_scale="act_scale",
        cache_scales=("kv_scale",),
    ),
    "compressed-tensors static": Variant(
        "compressed-tensors",
        compressed(group(numbers("tensor"), numbers("tensor"))),
        scale="one",
        scale_dtype=ml_dtypes.bfloat16,
        input_scale="input_scale",
    ),
    "compressed-tensors dynamic": Variant(
        "compressed-tensors",
        compressed(group(numbers("channel"), TOKEN)),
        scale="column",
        scale_dtype=ml_dtypes.bfloat16,
    ),
    "compressed-tensors block": Variant(
        "compressed-tensors",
        compressed(group(IN_BLOCKS, IN_GROUPS)),
        scale="blocks",
        scale_dtype=ml_dtypes.bfloat16,
        activation_group=128,
    ),
    "compressed-tensors cache alone": Variant(
        "compressed-tensors",
        compressed(format="dense", ignore=[], kv_cache_scheme=numbers("tensor")),
        cache_scales=("k_scale", "v_scale"),
        plain=tuple(LINEARS),
    ),
    "compressed-tensors attention alone": Variant(
        "compressed-tensors",
        compressed(
            group(None, numbers("tensor"), targets=("LlamaAttention",), format="dense"),
            format="dense",
            ignore=[],
            kv_cache_scheme=numbers("tensor"),
        ),
        cache_scales=("k_scale", "v_scale", "q_scale"),
        plain=tuple(LINEARS),
    ),
    "compressed-tensors with cache scales per head": Variant(
        "compressed-tensors",
        compressed(
            group(numbers("channel"), TOKEN), kv_cache_scheme=numbers("attn_head", dynamic=False)
        ),
        scale="column",
        cache_scales=("k_scale", "v_scale"),
        cache_scale_shape=(2, 1, 1),
    ),
    "compressed-tensors attention and matrices": Variant(
        "compressed-tensors",
        compressed(
            group(IN_BLOCKS, IN_GROUPS),
            group(None, numbers("tensor"), targets=("re:.*self_attn$",), format="dense"),
        ),
        scale="blocks",
        cache_scales=("k_scale", "v_scale", "q_scale"),
        activation_group=128,
    ),
    "compressed-tensors activations alone": Variant(
        "compressed-tensors",
        compressed(
            group(numbers("channel"), TOKEN, targets=("re:.*self_attn.*",)),
            group(None, TOKEN, format="dense"),
            format="mixed-precision",
        ),
        scale="column",
        plain=tuple(name for name in LINEARS if ".mlp." in name),
    ),
    "compressed-tensors weight only": Variant(
        "compressed-tensors", compressed(group(numbers("channel"), None)), scale="column"
    ),
    "compressed-tensors with cache scales": Variant(
        "compressed-tensors",
        compressed(group(numbers("tensor"), numbers("tensor")), kv_cache_scheme=numbers("tensor")),
        scale="one",
        input_scale="input_scale",
        cache_scales=("k_scale", "v_scale"),
    ),
    "compressed-tensors of 2024": Variant(
        "compressed-tensors",
        {
            "compression_config": {
                "config_groups": {
                    "group_0": {
                        "input_activations": {"num_bits": 8, "type": "float", "dynamic": False},
                        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
                        "targets": ["Linear"],
                    }
                },
                "format": "naive-quantized",
                "ignore": ["re:.*lm_head", "re:.*layers\\.1\\.self_attn.*"],
                "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
                "sparsity_config": {"format": "dense", "global_sparsity": 0.1},
                "quantization_status": "frozen",
            }
        },
        input_scale="input_scale",
        cache_scales=("k_proj.output_scale", "v_proj.output_scale"),
        plain=ATTENTION[1],
    ),
    "compressed-tensors by names": Variant(
        "compressed-tensors",
        compressed(
            group(numbers("channel"), TOKEN, targets=("re:.*mlp.*",)),
            group(numbers("channel"), TOKEN, targets=ATTENTION[1][1:]),
            ignore=[DOWN],
        ),
        scale="column",
        plain=(DOWN, *ATTENTION[0], ATTENTION[1][0]),
    ),
    "fbgemm": Variant("fbgemm", fbgemm(), scale="column"),
    "fbgemm as Meta's 405B": Variant(
        "fbgemm",
        fbgemm([*ATTENTION[1], "model.layers.0.self_attn", "lm_head"], activation_scale_ub=20.5),
        scale="column",
        plain=(*ATTENTION[0], *ATTENTION[1]),
    ),
    "modelopt": Variant(
        "modelopt",
        modelopt(config_groups=MODELOPT_GROUPS, ignore=["lm_head", "model.embed_tokens"]),
        input_scale="input_scale",
    ),
    "modelopt with cache scales": Variant(
        "modelopt",
        modelopt(kv_cache_scheme=MODELOPT_CACHE, ignore=["lm_head", "model.layers.1.self_attn*"]),
        input_scale="input_scale",
        cache_scales=("k_proj.k_scale", "v_proj.v_scale"),
        plain=ATTENTION[1],
        files=modelopt_file(
            kv_cache_quant_algo="FP8", exclude_modules=["model.layers.1.self_attn*", "lm_head"]
        ),
    ),
    "modelopt per channel": Variant(
        "modelopt", modelopt("FP8_PER_CHANNEL_PER_TOKEN"), scale="rows"
    ),
    "modelopt in blocks": Variant("modelopt", modelopt("fp8_pb_wo"), scale="spread blocks"),
    "modelopt mixed": Variant(
        "modelopt",
        modelopt(
            "MIXED_PRECISION",
            ignore=[],
            quantized_layers={name: {"quant_algo": "FP8"} for name in ATTENTION[1]},
            config_groups={"group_0": MODELOPT_GROUPS["group_0"] | {"targets": ATTENTION[1]}},
        ),
        input_scale="input_scale",
        plain=tuple(name for name in LINEARS if name not in ATTENTION[1]),
    ),
    "modelopt of 2024": Variant(
        "modelopt",
        {},
        input_scale="input_scale",
        cache_scales=("k_proj.k_scale", "v_proj.v_scale"),
        files=modelopt_file(kv_cache_quant_algo="FP8"),
    ),
    "finegrained": Variant(
        "finegrained",
        finegrained(),
        scale="blocks",
        weight_scale="weight_scale_inv",
        activation_group=128,
    ),
    "finegrained in bfloat16": Variant(
        "finegrained",
        finegrained(scale_fmt="float", dequantize=False, fmt="e4m3", modules_to_convert=None),
        scale="blocks",
        weight_scale="weight_scale_inv",
        scale_dtype=ml_dtypes.bfloat16,
        activation_group=128,
    ),
    "finegrained with exponents": Variant(
        "finegrained",
        finegrained(scale_fmt="ue8m0"),
        scale="blocks",
        weight_scale="weight_scale_inv",
        scale_dtype=ml_dtypes.float8_e8m0fnu,
        activation_group=128,
    ),
    "finegrained with exponents in bytes": Variant(
        "finegrained",
        finegrained(scale_fmt="ue8m0"),
        scale="blocks",
        weight_scale="weight_scale_inv",
        scale_dtype=np.uint8,
        activation_group=128,
    ),
    "finegrained, ragged matrices left out": Variant(
        "finegrained",
        finegrained(),
        scale="blocks",
        weight_scale="weight_scale_inv",
        plain=(DOWN,),
        activation_group=128,
    ),
    "finegrained, one scale and static": Variant(
        "finegrained",
        finegrained(weight_block_size=None, activation_scheme="static"),
        weight_scale="weight_scale_inv",
        input_scale="activation_scale",
    ),
    "finegrained, static": Variant(
        "finegrained",
        finegrained(activation_scheme="static"),
        scale="blocks",
        weight_scale="weight_scale_inv",
        input_scale="activation_scale",
    ),
    "torchao per row": Variant(
        "torchao",
        torchao(modules_to_not_convert=[DOWN]),
        scale="column",
        weight="_weight_qdata",
        weight_scale="_weight_scale",
        plain=(DOWN,),
        metadata=torchao_metadata(per_row=True, plain=(DOWN,)),
    ),
    "torchao per block, by names": Variant(
        "torchao",
        torchao("FqnToConfig"),
        scale="blocks",
        weight="_weight_qdata",
        weight_scale="_weight_scale",
        metadata=torchao_metadata(blocks=True),
        activation_group=128,
    ),
    "torchao per tensor": Variant(
        "torchao",
        torchao("Float8WeightOnlyConfig"),
        scale="one by one",
        weight="_weight_qdata",
        weight_scale="_weight_scale",
        metadata=torchao_metadata(per_row=False),
    ),
}


def safetensors_bytes(
    arrays: Mapping[str, np.ndarray],
    edit: Callable[[dict], None] = len,
    metadata: Mapping[str, str] = {},
) -> bytes:
    """Return one file. `edit` may change its header first."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    data = b""
    for name, array in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {
            "dtype": TAGS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": offsets,
        }
        data += array.tobytes()
    edit(header)
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def write(
    directory: Path,
    arrays: Mapping[str, np.ndarray],
    config: Mapping[str, Any] = {},
    shards: int = 1,
    files: Mapping[str, Any] = {},
    metadata: Mapping[str, str] = {},
) -> Path:
    """Write a checkpoint directory: weights in one file or in shards, tokenizer files, `files`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | dict(config)))
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    (directory / "tokenizer.json").write_text(byte_tokenizer_json())
    for name, contents in files.items():
        (directory / name).write_text(json.dumps(contents))
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(arrays, metadata=metadata))
        return directory
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: arrays[key] for key in sorted(arrays)[shard::shards]}
        weight_map |= dict.fromkeys(part, name)
        (directory / name).write_bytes(safetensors_bytes(part, metadata=metadata))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def byte_tokenizer_json(special: str = "<|end_of_text|>") -> str:
    """Return a tokenizer.json like Llama 3's, with a token for each byte and a special one."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return json.dumps(
        {
            "added_tokens": [{"id": 256, "content": special, "special": True}],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": byte_characters(), "merges": []},
        }
    )


def byte_characters() -> dict[str, int]:
    """Return byte-level BPE's character for each byte: the byte itself or one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
