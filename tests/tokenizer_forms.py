"""Small tokenizer.json files, each in the form of a family of Llama-architecture models.

All are built by hand, with the fields of the family's files and a few merges of single bytes or
characters, so that ids can be checked by eye.
"""

from collections.abc import Mapping
from typing import Any

from tests.tiny_checkpoints import byte_characters

Json = dict[str, Any]

SPACE = "\u2581"
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_REGEX = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = "the of and to in is that for it was on with he be by at you are this not hello world 12"
MORE = "über größer été où привет мир 你好 世界 こんにちは مرحبا नमस्ते 안녕 def return print == 🙂"


def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """Return merges that build words from the left; equal prefixes have equal merges."""
    pairs: dict[tuple[str, str], None] = {}
    for word in words:
        for end in range(2, len(word) + 1):
            pairs[word[: end - 1], word[end - 1]] = None
    return list(pairs)


def splits_of(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that make a token, in the order of ids, like the merges of a
    tokenizer.json that was made from Llama 3's tokenizer.model."""
    return [
        (token[:i], token[i:])
        for token in vocab
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]


def added(names: Mapping[str, int], **flags: Any) -> list[Json]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": name, **plain, "special": True, **flags} for name, i in names.items()
    ]


def template(before: str | None, number: int, after: str | None = None) -> Json:
    names = {name: number + i for i, name in enumerate(filter(None, (before, after)))}
    special = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": special[:1] + text + special[1:],
        "pair": special[:1] + text + special[1:] + [{"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in names.items()},
    }


def file(**parts: Any) -> Json:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer"))
    return {"version": "1.0", **empty, "post_processor": None, "added_tokens": [], **parts}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def byte_level(
    ignore_merges: bool = False,
    pairs: bool = False,
    splits: bool = False,
    unreachable: tuple[str, ...] = (),
    **parts: Any,
) -> Json:
    """Return a byte-level BPE.

    pairs: whether merges are lists, as tokenizers 0.20 and later write them. splits: whether they
    are those of `splits_of`. unreachable: tokens that no merge leads to.
    """
    chars = {byte: character for character, byte in byte_characters().items()}
    words = [f" {w}" for w in f"{WORDS} {MORE}".split()] + WORDS.split() + ["\n\n", "    "]
    written = ["".join(chars[b] for b in word.encode()) for word in words]
    merges = merges_of(written)
    vocab = {chars[byte]: byte for byte in range(256)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    vocab |= {token: len(vocab) + i for i, token in enumerate(unreachable)}
    if splits:
        merges = splits_of(vocab)
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": ignore_merges, "vocab": vocab,
        "merges": [list(pair) for pair in merges] if pairs else [" ".join(p) for p in merges],
    }  # fmt: skip
    return file(**{"decoder": {**BYTE_LEVEL, "use_regex": True}, "model": model, **parts})


def next_id(content: Json) -> int:
    return len(content["model"]["vocab"])


def llama3(pattern: str = LLAMA3_REGEX, **settings: Any) -> Json:
    """Llama 3, 3.1, Hermes 3, R1-Distill, Nemotron."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    steps = [{**split, "invert": False}, {**BYTE_LEVEL, "use_regex": False}]
    content = byte_level(**{"ignore_merges": True, "splits": True, **settings})
    number = next_id(content)
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>")  # fmt: skip
    content["added_tokens"] = added({name: number + i for i, name in enumerate(names)})
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [{**BYTE_LEVEL, "use_regex": True}, template(names[0], number)],
    }
    return content


def llama3_early() -> Json:
    """Llama 3 as first published: no ignore_merges, an empty normalizer, no BOS."""
    content = llama3(ignore_merges=False, unreachable=("xyz",))
    del content["model"]["ignore_merges"]
    content["normalizer"] = {"type": "Sequence", "normalizers": []}
    content["post_processor"] = {**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True}
    return content


def llama32() -> Json:
    """Llama 3.2 and 3.3: merges as pairs."""
    return llama3(pairs=True)


def hermes3() -> Json:
    content = llama3()
    number = next_id(content) + 5
    content["added_tokens"] += added({"<|im_start|>": number, "<|im_end|>": number + 1})
    names = ("<tool_call>", "</tool_call>", "<tool_response>")
    tools = {name: number + 2 + i for i, name in enumerate(names)}
    content["added_tokens"] += added(tools, special=False, normalized=True)
    return content


def r1_distill() -> Json:
    content = llama3()
    number = next_id(content) + 5
    names = ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>")
    content["added_tokens"] += added(
        {name: number + i for i, name in enumerate(names)}, special=False
    )
    return content


def smollm2() -> Json:
    """SmolLM2: GPT-2's pre-tokenizer behind single digits, no BOS."""
    content = byte_level()
    steps = [{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    number = next_id(content)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>")
    content["added_tokens"] = added({name: number + i for i, name in enumerate(names)})
    return content


def gpt2() -> Json:
    """GPT-2's own, with a space before the first word; merges out of the order of ids."""
    content = byte_level(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True})
    merges = content["model"]["merges"]
    content["model"]["merges"] = merges[40:] + merges[:40]
    content["added_tokens"] = added({"<|endoftext|>": next_id(content)}, lstrip=True)
    return content


def deepseek() -> Json:
    """DeepSeek's: several patterns, none of them Llama 3's."""
    content = llama3(DEEPSEEK_REGEX, ignore_merges=False)
    steps = content["pre_tokenizer"]["pretokenizers"]
    for pattern in (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"):
        steps.insert(0, {**steps[-2], "pattern": {"Regex": pattern}})
    return content


def llama2(**parts: Any) -> Json:
    """Llama 2, TinyLlama, Vicuna: characters with bytes to fall back on, the space as U+2581."""
    words = [SPACE + w for w in f"{WORDS} {MORE}".split()] + [SPACE * 2, SPACE * 4]
    characters = sorted({c for word in words for c in word} - set("🙂你مн"))
    words = [word for word in words if set(word) <= set(characters)]
    vocab = {name: i for i, name in enumerate(("<unk>", "<s>", "</s>"))}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = merges_of(words)
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    for character in characters:  # behind the merges, as in SentencePiece's models
        vocab.setdefault(character, len(vocab))
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
        "merges": [" ".join(pair) for pair in merges],
    }  # fmt: skip
    normalizers = [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]  # fmt: skip
    whole = {
        "added_tokens": added({"<unk>": 0, "<s>": 1, "</s>": 2}),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "post_processor": template("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }
    return file(**(whole | parts))


def llama2_first() -> Json:
    """Llama 2 and TinyLlama as converted with legacy: false: only the beginning gets a space."""
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first"}
    return llama2(normalizer=None, pre_tokenizer={**metaspace, "split": False})


def llama2_old() -> Json:
    """Llama 2's and Vicuna's first files: special tokens are looked for in normalized text."""
    special = added({"<unk>": 0, "<s>": 1, "</s>": 2}, normalized=True)
    return llama2(added_tokens=special, post_processor=template("<s>", 1, "</s>"))


def code_llama() -> Json:
    content = llama2()
    number = next_id(content)
    names = [f"{SPACE}<{name}>" for name in ("PRE", "MID", "SUF", "EOT")]
    names = {name: number + i for i, name in enumerate(names)}
    content["added_tokens"] += added(names, rstrip=True, lstrip=True)
    return content


def yi() -> Json:
    """Yi: no space before a text, chat tokens among the vocabulary's."""
    content = llama2()
    number = next_id(content)
    content["normalizer"]["normalizers"].pop(0)
    content["decoder"]["decoders"].pop()
    content["post_processor"] = None
    content["model"]["vocab"] |= {"<|im_start|>": number, "<|im_end|>": number + 1}
    content["added_tokens"] += added({"<|im_start|>": number, "<|im_end|>": number + 1})
    return content


def words_only() -> Json:
    """A Metaspace that splits, NFKC, and an added token that is a word."""
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always"}
    content = llama2(normalizer={"type": "NFKC"}, pre_tokenizer={**metaspace, "split": True})
    content["added_tokens"] += added(
        {"word": next_id(content)}, single_word=True, special=False, normalized=True
    )
    return content


FORMS = {
    make.__name__: make
    for make in (
        llama3, llama3_early, llama32, hermes3, r1_distill, smollm2, gpt2, deepseek, llama2,
        llama2_first, llama2_old, code_llama, yi, words_only,
    )
}  # fmt: skip

TEXTS = (
    "hello world", "Hello, World! It's 12345.67 and you're not the 1st", " the  of   and    to",
    "this\tis\n\nthat\r\n  for\u00a0it\u2003was \x85on\u3000with ", "", " ", "   ", "\n", "a",
    "Über größer été où, señor: ¿qué? ß ẞ", "Привет, мир! Это проверка.",
    "你好\uff0c世界。今天天气很好",
    "こんにちは世界、カタカナ", "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया १२३", "안녕 세상", "สวัสดีชาวโลก",
    "def f(x):\n    return x == 12  # print\n\n\tif not x:\n\t\tpass\n", "{\"a\": [1, 2, null]}",
    "🙂🙂👩‍👩‍👧‍👦 🇩🇪 a🙂b", "\u2581the \u2581 of", "e\u0301 \ufb01 \u212b \u1100\u1161\u11a8",
    "\x00\x01\x1c\x1d \x7f\ufeff\u200b", "DON'T don'T \u2019s '\u017f \u212a", "xyz abcxyz xyzabc",
    "<0x0A><unk><s>x</s>", "word words word, a_word word", "x" * 50 + " " * 30 + "the" * 20,
)  # fmt: skip


def with_specials(content: Json) -> list[str]:
    """Return `TEXTS` and some texts with the form's added tokens."""
    names = [token["content"] for token in content["added_tokens"]]
    inside = [f"the {name} of{name}{name}\n and {name}" for name in names]
    return [*TEXTS, *names, *inside, *(f"  {name}  the" for name in names), "".join(names)]
