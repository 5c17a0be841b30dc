"""Suites that others wrote, against a server: lm-evaluation-harness' API models, schemathesis."""

import numpy as np
import pytest

from llama_jax import LLM, SamplingParams
from tests.served import serving

CONTEXTS = ["What is 47 + 85? ", "2, 4, 6, ", "The capital of France is"]
CONTINUATIONS = ["132", " 8", " Paris"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    llm = LLM.load(
        max_batch_size=4, max_seq_len=512, prefill_chunk=128, dtype="float32", verbose=False
    )
    with serving(llm, batch_dir=tmp_path_factory.mktemp("batches")) as served:
        yield served


@pytest.mark.parity
def test_lm_evals_local_completions_sees_the_figures_of_the_process(server):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="abacus", tokenizer_backend="remote",
        tokenized_requests=True, max_length=512, num_concurrent=2,
    )  # fmt: skip
    pairs = list(zip(CONTEXTS, CONTINUATIONS, strict=True))
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = model.loglikelihood(requests, disable_tqdm=True)
    encode = server.llm.tokenizer.encode
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        # The harness tokenises without BOS, and moves a context's last space to what follows it.
        before = encode(context.rstrip())
        whole = encode(context + continuation)
        score = server.llm.score(before, whole[len(before) :])
        assert logprob == pytest.approx(score.total, abs=1e-3)
        assert is_greedy == score.is_greedy
    arguments = ("What is 47 + 85?", {"until": ["\n"], "max_gen_toks": 12, "temperature": 0})
    (text,) = model.generate_until([Instance("generate_until", {}, arguments, 0)], True)
    assert text == server.llm.generate(arguments[0]).text


@pytest.mark.parity
def test_lm_evals_local_chat_completions_sees_the_replies_of_the_process(server):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

    model = LocalChatCompletion(
        base_url=f"{server.url}/v1/chat/completions", model="abacus", num_concurrent=2
    )
    settings = {"until": ["\n\n"], "max_gen_toks": 16, "temperature": 0}
    chats = [[{"role": "user", "content": context.strip()}] for context in CONTEXTS]
    requests = [
        Instance("generate_until", {}, (model.apply_chat_template(chat), settings), i)
        for i, chat in enumerate(chats)
    ]
    found = model.generate_until(requests, disable_tqdm=True)
    sampling = SamplingParams(temperature=0, max_new_tokens=16, stop=["\n\n"])
    assert found == [server.llm.chat(chat, sampling).text for chat in chats]


@pytest.mark.parity
def test_schemathesis_finds_nothing_against_the_served_document(server):
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi import checks as openapi_checks

    # Not that everything in the document's schemas is accepted: they cannot say that a template
    # refuses a role, or that a prompt is too long.
    checks = [
        *(
            getattr(openapi_checks, name)
            for name in (
                "status_code_conformance",
                "content_type_conformance",
                "response_schema_conformance",
            )
        ),
    ]
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen = np.zeros(600, int)
    for result in document.get_all_operations():
        operation = result.ok()

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case) -> None:
            if isinstance(case.body, dict):
                case.body["stream"] = False  # a stream is no JSON
                case.body["max_tokens"] = 4
            response = case.call()
            seen[response.status_code] += 1
            assert response.status_code < 500, response.text
            case.validate_response(response, checks=checks)

        check()
    assert seen[200] and seen[400]
