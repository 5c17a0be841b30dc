import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special

from converters import compare as comparing
from converters import layerwise
from converters.compare import Comparison, Setting, compare
from converters.opened import Opened
from converters.quantize import quantize_plan
from llama_jax.abacus import vocabulary
from llama_jax.cli import main
from llama_jax.model.spec import ModelSpec
from tests.test_layerwise import lively_params, plan_of, run
from tests.tiny import config, tokens

SPEC = ModelSpec(config(), dtype="float32")
ABACUS = Path(vocabulary.__file__).parent


def opened(plan: Any, vocab_size: int = 320) -> Opened:
    changed = config(vocab_size=vocab_size)
    return Opened(Path("tiny"), changed, "dense", plan, {}, (), frozenset())


def settings(**changes: Any) -> tuple[Setting, Setting]:
    """A dense model, and the same one quantised."""
    plan = plan_of(lively_params(SPEC), SPEC)
    other = Setting(opened(quantize_plan(plan, "row")), **{"dtype": "float32", **changes})
    return Setting(opened(plan), "float32"), other


def test_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_LOGIT_TOKENS", 16)  # 44 tokens are cut into three pieces
    a, b = settings()
    ids, done = tokens(4, 12), []
    found = compare(a, b, ids, done.append)
    assert sum(done) == 2 * 2 * ids.size
    both = [run(each.plan, each.spec("float32"), ids) for each in (a.checkpoint, b.checkpoint)]
    log_a, log_b = (scipy.special.log_softmax(each.astype(np.float64), axis=-1) for each in both)
    kl = scipy.special.rel_entr(np.exp(log_a), np.exp(log_b)).sum(axis=-1)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-5, atol=1e-6)
    assert kl.mean() > 1e-3
    chosen = [np.take_along_axis(x, ids[:, 1:, None], axis=-1)[..., 0] for x in (log_a, log_b)]
    np.testing.assert_allclose(found.log_likelihood_a, chosen[0], rtol=1e-5)
    np.testing.assert_allclose(found.log_likelihood_b, chosen[1], rtol=1e-5)
    top_a, top_b = (np.argsort(-x, axis=-1, kind="stable")[..., :5] for x in (log_a, log_b))
    np.testing.assert_array_equal(found.same_top, top_a[..., 0] == top_b[..., 0])
    pairs = zip(top_a.reshape(-1, 5).tolist(), top_b.reshape(-1, 5).tolist(), strict=True)
    shared = [len({*x} & {*y}) / 5 for x, y in pairs]
    np.testing.assert_allclose(found.shared_top.reshape(-1), shared, rtol=1e-6)
    summary = found.to_dict()
    assert summary["tokens"] == 44
    assert summary["kl_median"] == pytest.approx(np.median(kl), rel=1e-3)
    assert summary["kl_p99"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert summary["kl_max"] == pytest.approx(kl.max(), rel=1e-3)
    assert summary["perplexity_b"] == pytest.approx(np.exp(-chosen[1].mean()), rel=1e-5)
    worst = found.worst(2)
    assert worst[0] == tuple(np.unravel_index(kl.argmax(), kl.shape) + np.array([0, 1]))
    assert len(worst) == 2 and len(found.worst(100)) == 44


def test_a_model_is_like_itself() -> None:
    a, _ = settings()
    summary = compare(a, a, tokens(2, 9)).to_dict()
    assert summary["kl_max"] == 0 and summary["perplexity_ratio"] == 1
    assert summary["top_1_agreement"] == summary["top_5_agreement"] == 1


@pytest.mark.slow
def test_settings_change_the_second_model_alone() -> None:
    ids = tokens(2, 9)
    plain = compare(*settings(), ids)
    for changes in ({"activations": "dynamic"}, {"kv_dtype": "fp8"}, {"dtype": "bfloat16"}):
        found = compare(*settings(**changes), ids)
        np.testing.assert_array_equal(found.log_likelihood_a, plain.log_likelihood_a)
        assert (found.log_likelihood_b != plain.log_likelihood_b).any()


def test_a_vocabulary_of_fewer_tokens_than_the_top() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32))
    found = Comparison(*comparing._compare(logits, logits[:, ::-1], np.array([0, 2])))
    np.testing.assert_allclose(found.kl[0], 0.25 * np.log(2), rtol=1e-5)
    assert found.same_top.tolist() == [False, False]
    np.testing.assert_allclose(found.shared_top, [1, 1])


def test_different_vocabularies_and_missing_scales() -> None:
    a, b = settings()
    with pytest.raises(ValueError, match="vocabularies of 320 and 96 tokens"):
        compare(a, Setting(opened(b.checkpoint.plan, vocab_size=96)), tokens(2, 9))
    with pytest.raises(ValueError, match="activations='static' needs an input scale"):
        compare(*settings(activations="static"), tokens(2, 9))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("<|start_header_id|>user<|end_header_id|>\n\nWhat is 47 + 85?<|eot_id|>" * 20)
    return path


def compare_abacus(text: Path, *options: str) -> None:
    main(["compare", str(ABACUS / "checkpoint_bf16"), str(ABACUS / "checkpoint"),
          "--text", str(text), "--tokens", "128", "--sequence-length", "64", *options])  # fmt: skip


def test_command_json(text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        compare_abacus(text, "--json", "--worst", "3", "--activations-b", "static",
                       "--dtype-a", "float32")  # fmt: skip
    assert done.value.code == 0
    found = json.loads(capfd.readouterr().out)
    assert found["tokens"] == 2 * 63 and 0 < found["kl_mean"] < 0.2
    assert 0.5 < found["top_1_agreement"] <= 1 and len(found["worst"]) == 3
    worst = found["worst"][0]
    assert worst["kl"] == pytest.approx(found["kl_max"]) and worst["token"] and worst["after"]


def test_command_table(text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        compare_abacus(text, "--worst", "1")
    out = capfd.readouterr().out
    assert done.value.code == 0
    assert "KL per token" in out and "Where they differ most" in out and "perplexity" in out


def test_command_errors(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text.write_text("")
    with pytest.raises(SystemExit) as done:
        compare_abacus(text)
    assert done.value.code == 2 and "holds 0 tokens" in capfd.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["compare", str(tmp_path), str(ABACUS / "checkpoint"), "--text", str(text)])
    assert done.value.code == 2 and "error:" in capfd.readouterr().err


def test_command_refuses_other_tokenizers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in (ABACUS / "checkpoint").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["4"], vocab["7"] = vocab["7"], vocab["4"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SystemExit) as done:
        main(["compare", str(ABACUS / "checkpoint"), str(other), "--text", str(text)])
    assert done.value.code == 2
    assert "into different tokens" in capfd.readouterr().err
