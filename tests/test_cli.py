"""The command line, end to end, on a tiny random model with a byte-level tokenizer."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama_jax import LLM, cli
from llama_jax.cli import output, signals
from llama_jax.errors import CheckpointError
from llama_jax.results import Generation, Piece, Timings
from llama_jax.text.tools import ToolCall
from tests.tiny import config

ROOT = Path(__file__).parents[1]
BOS, EOS, EOT = 256, 257, 265
CONFIG = config(
    vocab_size=512, num_layers=1, max_position_embeddings=512, rope_scaling=None,
    bos_token_id=BOS, eos_token_ids=(EOS, EOT),
)  # fmt: skip
SMALL = ("--max-seq-len", "256", "--dtype", "float32")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(output.stdout, "width", 160)
        patch.setattr(output.stderr, "width", 160)
        patch.delenv("LLAMA_JAX_DEBUG", raising=False)
        yield


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line with arguments; (exit code, stdout, stderr)."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(
            sys, "stdin", stdin if not isinstance(stdin, str) else io.StringIO(stdin)
        )
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        code = ended.value.code
        return code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A Hugging Face directory."""
    directory = tmp_path_factory.mktemp("hf") / "tiny"
    directory.mkdir()
    c = CONFIG
    (directory / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama",
                "vocab_size": c.vocab_size, "hidden_size": c.hidden_size,
                "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_layers,
                "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads,
                "max_position_embeddings": c.max_position_embeddings, "rms_norm_eps": 1e-5,
                "rope_theta": c.rope_theta, "torch_dtype": "float32", "bos_token_id": BOS,
                "eos_token_id": [EOS, EOT],
            }
        )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {
        "model.embed_tokens": (c.vocab_size, c.hidden_size),
        "lm_head": (c.vocab_size, c.hidden_size),
        "model.layers.0.self_attn.q_proj": (q_size, c.hidden_size),
        "model.layers.0.self_attn.k_proj": (kv_size, c.hidden_size),
        "model.layers.0.self_attn.v_proj": (kv_size, c.hidden_size),
        "model.layers.0.self_attn.o_proj": (c.hidden_size, q_size),
        "model.layers.0.mlp.gate_proj": (c.intermediate_size, c.hidden_size),
        "model.layers.0.mlp.up_proj": (c.intermediate_size, c.hidden_size),
        "model.layers.0.mlp.down_proj": (c.hidden_size, c.intermediate_size),
    }
    tensors = {f"{k}.weight": rng.normal(0, 0.3, v).astype(np.float32) for k, v in shapes.items()}
    # Only printable characters are ever likely, so that replies can be compared as text.
    tensors["lm_head.weight"][:97] *= 0.01
    tensors["lm_head.weight"][123:] *= 0.01
    for norm in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{norm}.weight"] = np.ones(c.hidden_size, np.float32)
    save_file(tensors, directory / "model.safetensors")
    lines = (b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))
    (directory / "tokenizer.model").write_bytes(b"".join(lines))
    return directory


@pytest.fixture(scope="session")
def model(source, tmp_path_factory):
    """The same, converted to FP8 by the command line."""
    target = tmp_path_factory.mktemp("converted") / "tiny-fp8"
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", str(source), str(target), "--quantize", "row", "--json"])
    assert ended.value.code in (0, None)
    return target


def test_help_teaches_and_does_not_wait_for_jax():
    program = (
        "import sys; from llama_jax.cli import app; app(['--help'], standalone_mode=False); "
        "sys.exit('jax' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for command in ("convert", "inspect", "generate", "chat", "score", "eval", "bench"):
        assert command in result.stdout
    assert 'llama-jax chat -m "What is 47 + 85?"' in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        "convert", "inspect", "generate", "chat", "score", "eval", "bench", "serve", "batch",
        "export", "verify", "compare", "bench-serve",
    ],
)  # fmt: skip
def test_each_command_shows_examples_on_lines_of_their_own_and_has_json(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Examples" in out
    examples = [line.strip() for line in out.splitlines() if f"llama-jax {command}" in line]
    assert len(examples) >= 2
    assert all(line.count("llama-jax") == 1 for line in examples if "&&" not in line)
    assert ("--json" in out) == (command not in ("serve", "batch"))


def test_chat_prints_the_reply_alone_on_stdout(run, model):
    code, out, err = run("chat", model, "-m", "hello", "--max-new-tokens", 8, *SMALL)
    assert code == 0
    assert len(out) == 9 and out.endswith("\n") and out[:8].isalpha()
    assert "tiny-fp8" in err
    assert "prefill" in err and "decode" in err and "tok/s" in err
    assert "cut after 8 tokens" in err


@pytest.mark.slow
def test_the_speed_of_a_reply_leaves_out_what_was_compiled_meanwhile(run, model):
    lengths = ("--max-new-tokens", 8, "--max-seq-len", 320)  # of no other test: it compiles
    code, out, _ = run("chat", model, "-m", "hello", "--json", *lengths)
    reply = json.loads(out)
    assert code == 0 and reply["compile"]["compiled"] + reply["compile"]["from_cache"] > 0
    assert reply["prefill_seconds"] > 0 and reply["decode_seconds"] > 0


def test_chat_json_keeps_the_history_over_turns(run, model):
    arguments = ("--max-new-tokens", 8, "--json", *SMALL)
    code, out, err = run("chat", model, "-m", "hello", "-m", "again", *arguments)
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and err == ""
    assert first["message"] == "hello" and second["message"] == "again"
    assert first["finish_reason"] == "length" and first["completion_tokens"] == 8
    assert len(first["reply"]) == 8
    # Header, "again" and end of turn, besides all that was said before.
    assert second["prompt_tokens"] > first["prompt_tokens"] + 8 + len("again")
    for reply in (first, second):
        rate = reply["prefill_tokens_per_second"] * reply["prefill_seconds"]
        assert rate == pytest.approx(reply["prompt_tokens"])
        assert reply["decode_tokens_per_second"] * reply["decode_seconds"] == pytest.approx(7)
    assert second["compile"]["compiled"] + second["compile"]["from_cache"] == 0 or (
        second["prompt_tokens"] > 32  # another chunk size
    )
    alone = run("chat", model, "-m", "again", *arguments)[1]
    assert json.loads(alone)["prompt_tokens"] < second["prompt_tokens"]


def test_chat_reads_a_message_per_line_from_a_pipe(run, model):
    code, out, _ = run("chat", model, "--max-new-tokens", 4, *SMALL, stdin="hello\n\nagain\n")
    assert code == 0
    assert [len(line) for line in out.splitlines()] == [4, 4]


@pytest.fixture
def conversation(run, model, monkeypatch):
    """Type lines into an interactive chat; Ctrl-D comes after the last."""

    def converse(*lines, arguments=()):
        typed = iter(lines)

        def read(prompt):
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        arguments = arguments or ("--max-new-tokens", 4, *SMALL)
        return run("chat", model, *arguments, stdin=Terminal())

    return converse


def test_interactive_chat(conversation):
    code, out, err = conversation("hello", "/help", "", KeyboardInterrupt, "again")
    assert code == 0
    assert [len(line) for line in out.splitlines() if line] == [4, 4]
    assert "/reset" in err


def test_reset_and_system_start_over(conversation):
    once = conversation("hello")[1].split()
    out = conversation("hello", "/reset", "hello", "/system Be brief.", "hello", "/quit", "no")[1]
    first, after_reset, with_system = out.split()
    assert [first] == once
    assert after_reset == first
    assert with_system != first


def test_control_c_stops_a_reply_but_not_the_chat(conversation, monkeypatch):
    module = sys.modules["llama_jax.cli.chat"]  # the package's name for it is the command
    show, seen = module._show, []

    def interrupt_once(text):
        show(text)
        seen.append(text)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_show", interrupt_once)
    code, out, err = conversation("hello", "again")
    assert code == 0
    assert "stopped" in err
    assert [len(line) for line in out.splitlines() if line] == [2, 4]


def test_full_context_is_explained_and_the_chat_goes_on(conversation):
    code, _, err = conversation("x" * 225, "x" * 300, "/reset", "hello", arguments=SMALL)
    assert code == 0
    assert "the context is full: 256 of 256 tokens. /reset starts over" in err
    assert "max_seq_len is 256" in err
    assert "Your message was not added" in err


def test_tool_calls_are_shown_and_answered(conversation, monkeypatch, tmp_path):
    asked = []
    call = ToolCall("add", {"a": 1}, "call-1")

    def stream(self, messages, sampling, *, tools):
        asked.append((messages, tools))
        reply = ("", (call,)) if len(asked) == 1 else ("four", ())
        timings = Timings(prefill=1e-6, decode=1e-6)  # no longer than the call has taken
        yield Piece(reply[0], Generation(reply[0], (1,), "stop", (1,), None, timings, reply[1]))

    monkeypatch.setattr("llama_jax.llm.LLM.stream", stream)
    schema = {"type": "function", "function": {"name": "add"}}
    (tmp_path / "tools.json").write_text(json.dumps([schema]))
    arguments = ("--tools", tmp_path / "tools.json", *SMALL)
    code, out, err = conversation("hello", "/tool 3", arguments=arguments)
    assert code == 0
    assert 'tool call: add({"a": 1})' in err
    assert out.strip() == "four"
    second, tools = asked[1]
    assert tools == [schema]
    assert second == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "tool_calls": (call,)},
        {"role": "tool", "content": "3"},
    ]


def test_generate_streams_a_prompt(run, model):
    options = ("--max-new-tokens", 6, "--temperature", 0, *SMALL)
    code, out, err = run("generate", model, "--prompt", "hello", *options)
    assert code == 0 and len(out) == 7
    assert "tok/s" in err
    code, as_json, _ = run("generate", model, "--prompt", "hello", "--json", *options)
    assert json.loads(as_json) == {
        "prompt": "hello", "text": out.rstrip("\n"), "finish_reason": "length",
        "prompt_tokens": 6, "completion_tokens": 6,
    }  # fmt: skip
    stopped = run("generate", model, "--prompt", "hello", "--stop", out[3], "--json", *options)[1]
    assert json.loads(stopped)["text"] == out[: out.index(out[3])]
    assert json.loads(stopped)["finish_reason"] == "stop"


def test_the_old_name_of_speculative_tokens_is_taken(run, tmp_path):
    code, _, err = run("generate", tmp_path / "none", "--prompt", "hi", "--lookahead", 2)
    assert code == 2 and "none" in err and "lookahead" not in err
    with (
        pytest.warns(FutureWarning, match="num_speculative_tokens"),
        pytest.raises(CheckpointError),
    ):
        LLM.load(tmp_path / "none", lookahead=2)


@pytest.mark.slow
def test_generate_samples_and_speculates(run, model):
    options = ("--max-new-tokens", 6, "--temperature", 1, "--seed", 3, *SMALL)
    arguments = ("generate", model, "--prompt", "hello " * 9, "--samples", 3, "--json", *options)
    code, out, err = run(*arguments)
    samples = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and "prompt tokens" in err and "18 tokens" in err
    assert [each["sample"] for each in samples] == [0, 1, 2]
    assert len({each["text"] for each in samples}) == 3
    for how in (("--num-speculative-tokens", 2), ("--draft", model)):
        code, speculated, err = run(*arguments, *how)
        assert code == 0 and speculated == out and "draft tokens accepted" in err
    code, out, _ = run("chat", model, "-m", "hello", "--draft", model, "--json", *options)
    assert code == 0 and json.loads(out)["acceptance_rate"] > 0.9


def test_generate_from_a_file_into_a_file(run, model, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "hello"}\n\n{"prompt": "again"}\n')
    arguments = ("generate", model, "--input", tmp_path / "in.jsonl", "--output",
                 tmp_path / "out.jsonl", "--max-new-tokens", 3, "--max-batch-size", 1,
                 *SMALL)  # fmt: skip
    code, out, err = run(*arguments)
    assert code == 0 and out == ""
    assert "2 prompts, 6 tokens" in err
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["id"] == 1 and len(first["text"]) == 3
    assert second["prompt"] == "again"
    code, _, err = run(*arguments)
    assert code == 2 and "out.jsonl exists already" in err and "--overwrite" in err
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n')
    code, _, err = run(*arguments, "--overwrite")
    assert code == 0 and "1 prompt, 3 tokens" in err


def test_convert_reports_and_refuses_to_overwrite(run, source, tmp_path):
    code, out, _ = run("convert", source, tmp_path / "new", "--json")
    facts = json.loads(out)
    (weights,) = source.glob("*.safetensors")
    assert code == 0
    assert facts["dialect"] == "dense" and facts["modules"] == {"float32": 12}
    assert facts["total_bytes"] == sum(each.nbytes for each in load_file(weights).values())
    assert facts["tokenizer_files"] == ["tokenizer.model"]
    code, _, err = run("convert", source, tmp_path / "new")
    assert code == 2 and "exists already" in err
    code, out, _ = run("convert", source, tmp_path / "new", "--overwrite", "--quantize", "block")
    assert code == 0
    assert "7 x float8_e4m3fn, a scale per block" in out


def test_bench_json_is_complete(run, model, monkeypatch):
    from llama_jax import bench

    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1e9)
    code, out, _ = run(
        "bench", model, "--batch", "1", "--prompt-len", "5,7", "--new-tokens", 2, "--json",
        "--dtype", "float32",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0
    assert [(m["batch_size"], m["prompt_len"]) for m in report["measurements"]] == [(1, 5), (1, 7)]
    for m in report["measurements"]:
        assert m["decode_tokens_per_second"] == pytest.approx(
            m["batch_size"] / m["decode_step_seconds"]
        )
        read = m["decode_weight_bytes"] + m["decode_kv_bytes"]
        assert m["fraction_of_copy"] == pytest.approx(read / m["decode_step_seconds"] / 1e9)
    assert report["fp8_lm_head"] is False
    assert report["model"] == "tiny-fp8" and report["copy_bytes_per_second"] == 1e9
    assert set(report) == {
        "model", "dtype", "activations", "implementation", "kv_dtype", "environment",
        "measurements", "copy_bytes_per_second", "compile", "peak_memory", "fp8_lm_head",
    }  # fmt: skip
    code, out, _ = run(
        "bench", model, "--batch", "1", "--prompt-len", "5", "--new-tokens", 2, "--dtype", "float32"
    )
    assert code == 0
    assert "1.0 GB/s, read and written" in out and "resident set of the process" in out


BAD_CALLS = [
    (["chat", "no/such-model-here", "-m", "x"], 2, "no/such-model-here"),
    (["chat", "-m", "x", "--temperature", "-1", "MODEL"], 2, "temperature must be finite"),
    (["chat", "-m", "x", "--tools", "missing.json", "MODEL"], 2, "missing.json"),
    (["chat", "-m", "x", "--kv-dtype", "int4", "MODEL"], 2, "int4"),
    (["generate", "MODEL"], 2, "--prompt TEXT or --input FILE"),
    (["generate", "MODEL", "--prompt", ""], 2, "the prompt is empty"),
    (["generate", "MODEL", "--input", "missing.txt"], 2, "missing.txt"),
    (["generate", "MODEL", "--prompt", "a", "--output", "missing/out"], 2, "directory does not"),
    (["score", "missing.jsonl", "-", "--model", "MODEL"], 2, "missing.jsonl"),
    (["inspect", "missing"], 2, "missing is neither a directory nor"),
    (["inspect", "MODEL", "--max-seq-len", "100000"], 2, "512 tokens"),
    (["inspect", "MODEL", "--device", "h200"], 2, "go with --paths"),
    (["inspect", "MODEL", "--program", "decode"], 2, "goes with --device h200"),
    (["inspect", "MODEL", "--paths", "--preset", "llama-3.1-8b"], 2, "not both"),
    (["convert", "missing", "target"], 2, "missing is neither a directory nor"),
    (["convert", "./missing", "target"], 2, "./missing is neither a directory nor"),
    (["export", "no/such", "out", "--format", "fp8"], 2, "there is no directory no/such"),
    (["bench", "MODEL", "--preset", "llama-3.1-8b"], 2, "not both"),
    (["bench", "MODEL", "--quantize-lm-head"], 2, "goes with --preset"),
    (["bench", "--preset", "llama-9"], 2, "llama-3.1-8b"),
    (["bench", "MODEL", "--batch", "one"], 2, "expected numbers separated by commas"),
    (["bench", "MODEL", "--prompt-len", "600", "--batch", "1"], 2, "context of 512 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected", "message"), BAD_CALLS, ids=[" ".join(c[0]) for c in BAD_CALLS]
)
def test_mistakes_are_explained(run, model, monkeypatch, tmp_path, arguments, expected, message):
    from llama_jax import bench

    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*(str(model) if a == "MODEL" else a for a in arguments))
    assert code == expected
    assert message in " ".join(err.replace("│", " ").split())
    assert out == "" and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("chat", "-m", "hello"), ("bench", "--prompt-len", "64")])
def test_a_model_that_does_not_fit_is_refused_with_the_sizes(run, model, monkeypatch, arguments):
    monkeypatch.setattr("llama_jax.engine.memory.device_memory_bytes", lambda _: 100_000)
    code, out, err = run(*arguments, model)
    assert code == 1 and out == ""
    assert "needed, 100.0 kB available: weights 308.2 kB" in err


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_DEBUG", "")
    assert "Traceback" in run("--debug", "inspect", "missing")[2]
    monkeypatch.setenv("LLAMA_JAX_DEBUG", "1")
    assert "Traceback" in run("inspect", "missing")[2]


@pytest.mark.slow
def test_second_start_takes_its_programs_from_the_cache(model, tmp_path, no_shared_cache):
    environment = os.environ | {"LLAMA_JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    arguments = ["chat", str(model), "-m", "hello", "--max-new-tokens", "4", "--json", *SMALL]

    def start():
        result = subprocess.run(
            [sys.executable, "-m", "llama_jax.cli", *arguments], cwd=ROOT, env=environment,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert result.stderr == ""
        return json.loads(result.stdout)

    first, second = start(), start()
    assert first["compile"]["from_cache"] == 0 and first["compile"]["compiled"] > 0
    assert second["compile"] | {"seconds": 0} == {
        "compiled": 0, "from_cache": first["compile"]["compiled"], "seconds": 0,
    }  # fmt: skip
    assert second["reply"] == first["reply"]


def test_ctrl_c_while_jax_loads_plugins_is_not_lost():
    """JAX catches and logs whatever is raised there, which takes seconds with CUDA's."""
    caught = []

    def discover_pjrt_plugins():
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException as error:
            caught.append(error)

    def load_and_wait():
        discover_pjrt_plugins()
        for _ in range(1000):
            time.sleep(0.01)

    before = signal.signal(signal.SIGINT, signals._interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            load_and_wait()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not caught
