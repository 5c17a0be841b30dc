"""This module answers what needs no new tokens.

That is /tokenize, /detokenize, /v1/models and /v1/score.
"""

import time

from llama_jax.jobs import Job
from llama_jax.results import Ranking
from llama_jax.serve.errors import bad_request
from llama_jax.serve.replies import (
    ModelCard,
    ModelList,
    ScoreItem,
    ScoreReply,
    Text,
    TokenizerInfo,
    Tokens,
    new_id,
)
from llama_jax.serve.schemas import DetokenizeRequest, ScoreRequest, TokenizeRequest
from llama_jax.serve.service import Service


def models(service: Service) -> ModelList:
    cards = [
        ModelCard(
            id=name,
            created=service.created,
            root=service.root,
            max_model_len=service.llm.max_seq_len,
        )
        for name in service.options.names
    ]
    return ModelList(data=cards)


def tokenizer_info(service: Service) -> TokenizerInfo:
    """Tells what lm-evaluation-harness wants to know before it uses /tokenize."""
    tokenizer = service.llm.tokenizer
    named = tokenizer.named_tokens.get
    return TokenizerInfo(
        bos_token=named("bos_token"),
        eos_token=named("eos_token"),
        pad_token=named("pad_token"),
        chat_template=tokenizer.chat_template,
    )


async def tokenize(service: Service, body: TokenizeRequest) -> Tokens:
    """Turns a prompt or a conversation into token ids."""
    service.check_model(body.model)
    tokenizer = service.llm.tokenizer

    def encode() -> list[int]:
        from llama_jax.text.chat import encode_chat

        if body.messages is None:
            around = body.add_special_tokens
            return tokenizer.encode(body.prompt or "", bos=around, eos=around)
        return encode_chat(
            tokenizer,
            body.messages,
            tools=body.tools or None,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )

    ids = await service.in_thread(encode)
    return Tokens(
        count=len(ids),
        max_model_len=service.llm.max_seq_len,
        tokens=ids,
        token_strs=[tokenizer.token_text(i) for i in ids] if body.return_token_strs else None,
    )


async def detokenize(service: Service, body: DetokenizeRequest) -> Text:
    """Turns token ids into text, special tokens into their names."""
    service.check_model(body.model)
    size = service.llm.spec.config.vocab_size
    if body.tokens and max(body.tokens) >= size:
        raise bad_request(f"tokens: ids must be below {size}", "tokens")
    decode = service.llm.tokenizer.decode
    return Text(prompt=await service.in_thread(lambda: decode(body.tokens, skip_special=False)))


async def score(service: Service, body: ScoreRequest, began: float) -> ScoreReply:
    """Tells how likely each completion is after the prompt, which is computed once."""
    service.check_model(body.model)
    service.check_queue(len(body.completions))

    def make() -> Job[Ranking]:
        return service.llm.rank_job(body.prompt, body.completions)

    job = await service.in_thread(make)
    ranking = await service.run(job, began)
    text = service.llm.tokenizer.token_text
    data = [
        ScoreItem(
            index=index,
            logprob=each.total,
            num_tokens=len(each.token_ids),
            perplexity=each.perplexity,
            is_greedy=each.is_greedy,
            probability=probability,
            tokens=[text(token_id) for token_id in each.token_ids],
            token_logprobs=list(each.logprobs),
        )
        for index, (each, probability) in enumerate(
            zip(ranking.scores, ranking.probabilities, strict=True)
        )
    ]
    return ScoreReply(
        id=new_id("score"),
        created=int(time.time()),
        model=service.name,
        best=ranking.best,
        data=data,
        usage=service.usage(job.requests, len(job.requests)),
    )
