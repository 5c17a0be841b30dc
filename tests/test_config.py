import json
import math

import numpy as np
import pytest

from llama_jax.model.config import PRESETS, ConfigError, LlamaConfig, RopeScaling
from llama_jax.model.config_files import FIXED, HARMLESS
from llama_jax.model.rope import rope_frequencies

HF = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
}  # fmt: skip
PARAMS = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
    "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "norm_eps": 1e-5, "rope_theta": 500000.0,
    "use_scaled_rope": True,
}  # fmt: skip


def test_old_form_is_the_8b_preset():
    assert LlamaConfig.from_hf(HF) == PRESETS["llama-3.1-8b"]


def test_transformers_5_form_is_the_same():
    new = {k: v for k, v in HF.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    new["rope_parameters"] = {**HF["rope_scaling"], "rope_theta": 500000.0}
    new |= {"dtype": "bfloat16", "head_dim": 128, "pad_token_id": None}
    assert LlamaConfig.from_hf(new) == PRESETS["llama-3.1-8b"]


def test_old_spelling_of_the_rope_type():
    scaling = {k: v for k, v in HF["rope_scaling"].items() if k != "rope_type"}
    config = LlamaConfig.from_hf({**HF, "rope_scaling": {**scaling, "type": "llama3"}})
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_unscaled_rope():
    for rope in (None, {"rope_type": "default"}, {"rope_type": "default", "factor": 1.0}):
        assert LlamaConfig.from_hf({**HF, "rope_scaling": rope}).rope_scaling is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("model_type", "mistral"),
        ("sliding_window", 4096),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"factor": 8.0}),
        ("architectures", ["MistralForCausalLM"]),
        ("num_key_value_heads", 7),
        ("torch_dtype", "float64"),
        ("head_dim", 127),
        ("num_hidden_layers", 0),
        ("qk_norm", True),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{key}"):
        LlamaConfig.from_hf({**HF, key: value})


@pytest.mark.parametrize(
    "extra",
    [
        {"unsloth_fixed": True},
        {"is_llama_config": True, "rope_interleaved": False},
        {"_commit_hash": "4e20de36"},
        {"_attn_implementation": "sdpa"},
        {"neftune_noise_alpha": None},
        {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
        {"layer_types": ["full_attention"] * 32},
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
        {"something_new": None, "another": False, "third": {}, "fourth": []},
        {"hidden_act": "swish"},
        {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048},
        {"pad_token_id": -1, "pretraining_tp": 2},
        {"partial_rotary_factor": 1, "embedding_multiplier": 1.0, "is_causal": True},
        {"rope_scaling": HF["rope_scaling"] | {"partial_rotary_factor": 1.0, "beta_fast": None}},
        {"rope_parameters": HF["rope_scaling"]},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_read(extra):
    assert LlamaConfig.from_hf({**HF, **extra}) == PRESETS["llama-3.1-8b"]


@pytest.mark.parametrize(
    ("rope", "factor"),
    [
        ({"type": "linear", "factor": 1.0}, 1),
        ({"type": "linear", "factor": 4.0}, 4),
        ({"rope_type": "linear", "factor": 4}, 4),
        ({"type": "dynamic", "factor": 2.0}, 1),  # says something of longer texts alone
    ],
)
def test_rope_may_be_stretched_evenly(rope, factor):
    config = LlamaConfig.from_hf({**HF, "rope_scaling": rope})
    assert config.rope_scaling is None and config.rope_linear_factor == factor
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    plain = LlamaConfig.from_hf({**HF, "rope_scaling": None})
    np.testing.assert_array_equal(rope_frequencies(config), rope_frequencies(plain) / factor)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_interleaved", True),
        ("layer_types", ["sliding_attention"]),
        ("layer_types", "full_attention"),
        ("is_causal", False),
        ("use_rope", False),
        ("embedding_multiplier", 12.0),
        ("partial_rotary_factor", 0.5),
        ("partial_rotary_factor", True),
        ("auto_map", {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}),
        ("quantization", {"group_size": 64, "bits": 4}),
        ("attn_logit_softcapping", 50.0),
        ("rope_scaling", {"rope_type": "llama3"} | {"factor": 4.0}),
        ("rope_scaling", {"type": "linear", "factor": 4.0, "mscale": 2.0}),
        ("rope_scaling", {"type": "linear", "factor": 0.5}),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"type": "linear", "rope_type": "llama3"}),
        ("rope_scaling", HF["rope_scaling"] | {"mscale": 2.0}),
        ("rope_parameters", HF["rope_scaling"] | {"factor": 4.0}),
    ],
    ids=str,
)
def test_what_can_change_the_model_stays_refused(key, value):
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{key}"):
        LlamaConfig.from_hf({**HF, key: value})


WRONG = {
    "vocab_size": [0, -1, "128256", None, True, 1.5, 2**40, [1], math.nan],
    "hidden_size": [0, "4096", None, {}, 1e21, 10**30],
    "intermediate_size": [0, "x", None],
    "num_hidden_layers": [0, -1, 10**7, 10**30, "32", None, 2.5, True],
    "num_attention_heads": [0, -4, "32", None, [], math.inf],
    "num_key_value_heads": [0, -8, "8", 8.0, 10**21],
    "head_dim": [0, -1, "128", 1.5],
    "max_position_embeddings": [0, -1, "131072", 1e30, math.inf, True],
    "rms_norm_eps": [0, -1e-5, 1.5, True, math.inf, math.nan, "1e-5", None, [1e-5]],
    "rope_theta": [0, -1.0, math.inf, math.nan, "500000", True, 0.5],
    "tie_word_embeddings": ["false", 0, 1, "yes", []],
    "torch_dtype": ["float64", 5, "int8", True, "x" * 400],
    "bos_token_id": [-1, "1", 1.0, True, 128256, 3_000_000_000, [1]],
    "eos_token_id": ["501", -1, 128256, 3_000_000_000, ["5"], [1, -1], 2.0, True, {}],
    "architectures": ["LlamaForCausalLM", 5, [5], {"a": 1}],
    "rope_scaling": [5, "llama3", [], True],
    "rope_parameters": [5, [1]],
    "hidden_act": [5, None, ["silu"]],
    "model_type": [None, 5, ["llama"]],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in WRONG.items() for v in vs], ids=str)
def test_a_value_of_a_wrong_type_or_range_is_named(key, value):
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{key}") as error:
        LlamaConfig.from_hf({**HF, key: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


ROPE_WRONG = {
    "factor": [0.5, -8.0, "8", math.nan, math.inf, True, None],
    "low_freq_factor": [0, -1.0, "1", math.nan, 4.0],
    "high_freq_factor": [0, "4", math.inf, math.nan, 0.5],
    "original_max_position_embeddings": [0, 8192.0, "8192", math.nan, 10**30],
    "rope_type": [5, "dynamic", ["llama3"], {}],
    "rope_theta": ["5", math.inf, 0, True],
}


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, vs in ROPE_WRONG.items() for v in vs], ids=str
)
def test_rope_scaling_of_a_wrong_type_or_range_is_named(key, value):
    with pytest.raises(ConfigError, match=r"^config\.json: rope_scaling.*") as error:
        LlamaConfig.from_hf({**HF, "rope_scaling": {**HF["rope_scaling"], key: value}})
    assert key in str(error.value) or "freq_factor" in str(error.value)


META_WRONG = {
    "dim": [0, -1, "4096", None, True, 1.5, 10**30],
    "n_layers": [0, 10**7, "32", None, True, 10**30],
    "n_heads": [0, "32", None, -1, 7.5],
    "n_kv_heads": [0, "8", 7, 8.0],
    "vocab_size": [0, -2, "x", 1.5, 10**12],
    "ffn_dim_multiplier": [0, -1.0, "1.3", math.nan, math.inf, True],
    "multiple_of": [0, -256, "256", 1.5],
    "norm_eps": [0, 1.5, True, math.inf, math.nan, "1e-5", None],
    "rope_theta": [0, math.inf, math.nan, "5", True],
    "use_scaled_rope": ["true", 1, 0, []],
}


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, vs in META_WRONG.items() for v in vs], ids=str
)
def test_params_json_of_a_wrong_type_or_range_is_named(key, value):
    with pytest.raises(ConfigError, match=rf"^params\.json: .*{key}"):
        LlamaConfig.from_params_json({**PARAMS, key: value})


def test_a_key_has_one_verdict():
    keys = [key for keys in HARMLESS.values() for key in keys] + [*FIXED]
    assert len(keys) == len(set(keys))


@pytest.mark.parity
def test_every_key_that_transformers_writes_is_known():
    transformers = pytest.importorskip("transformers")
    written = transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict()
    assert LlamaConfig.from_hf(written).num_layers == 32


def test_missing_key_is_named():
    values = {k: v for k, v in HF.items() if k != "rms_norm_eps"}
    with pytest.raises(ConfigError, match="rms_norm_eps"):
        LlamaConfig.from_hf(values)


def test_params_json_is_the_8b_preset_without_token_ids():
    config = LlamaConfig.from_params_json(PARAMS)
    expected = PRESETS["llama-3.1-8b"].to_dict() | {"bos_token_id": None, "eos_token_ids": []}
    assert config == LlamaConfig.from_dict(expected)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama-3.1-70b", {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096}),
        ("llama-3.1-405b", {"dim": 16384, "n_layers": 126, "n_heads": 128,
                            "ffn_dim_multiplier": 1.2, "multiple_of": 4096}),
        ("llama-3.2-1b", {"dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5,
                          "multiple_of": 256}),
        ("llama-3.2-3b", {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0,
                          "multiple_of": 256}),
    ],
)  # fmt: skip
def test_params_json_of_other_sizes(name, values):
    config = LlamaConfig.from_params_json({**PARAMS, **values})
    assert config.to_dict() | {"bos_token_id": 128000, "eos_token_ids": [128001, 128008, 128009]} \
        == PRESETS[name].to_dict()  # fmt: skip


def test_llama_2_params_json():
    values = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5,
              "vocab_size": -1}  # fmt: skip
    config = LlamaConfig.from_params_json(values)
    preset = PRESETS["llama-2-7b"]
    assert config.intermediate_size == preset.intermediate_size
    assert (config.vocab_size, config.num_kv_heads, config.rope_theta) == (32000, 32, 10000.0)


def test_params_json_refuses_unknown_keys():
    with pytest.raises(ConfigError, match="moe_args"):
        LlamaConfig.from_params_json({**PARAMS, "moe_args": {}})


def test_dict_round_trip():
    for preset in PRESETS.values():
        assert LlamaConfig.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset


@pytest.mark.parametrize("text", ["", "{", "[]", "\ufeff{}", "null"])
def test_broken_files_are_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        LlamaConfig.from_pretrained(tmp_path)


def test_directory_without_config(tmp_path):
    with pytest.raises(ConfigError, match=r"neither config\.json nor params\.json"):
        LlamaConfig.from_pretrained(tmp_path)


def test_the_published_files(shared_data):
    published = shared_data / "hf_llama_3_1_8b_instruct"
    assert LlamaConfig.from_pretrained(published) == PRESETS["llama-3.1-8b"]
