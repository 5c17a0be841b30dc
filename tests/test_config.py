import json

import pytest

from llama_jax.config import PRESETS, ConfigError, LlamaConfig, RopeScaling

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
    for rope in (None, {"rope_type": "default"}):
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
    name = {"torch_dtype": "dtype", "num_key_value_heads": "num_kv_heads",
            "num_hidden_layers": "num_layers"}.get(key, key)  # fmt: skip
    with pytest.raises(ConfigError, match=name):
        LlamaConfig.from_hf({**HF, key: value})


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
