"""Finds added tokens in a text: names that become single tokens before other rules apply.

Special ones, such as "<|eot_id|>", do not appear in decoded text. Matching follows the tokenizers
library (https://huggingface.co/docs/tokenizers/api/added-tokens).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

# Unicode's white space; Python's str.isspace includes four more control characters.
WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class AddedToken:
    """An added token and how it is matched.

    special: whether it is left out of decoded text.
    lstrip, rstrip: whether it takes white space on this side with it.
    single_word: whether it matches only between characters that are not letters, digits or
        underscores.
    normalized: whether it is matched in the normalized text, after those that are not.
    """

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Splitter:
    """Splits a text at its added tokens; of several that begin at one place, at the longest."""

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        """Prepare the search. tokens: the added tokens by name."""
        self._tokens = tokens
        names = sorted(filter(None, tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None

    def split(self, text: str) -> Iterator[str | AddedToken]:
        """Return the tokens in `text` and the text between them, without empty strings."""
        done = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            token, (start, stop) = self._tokens[match[0]], match.span()
            if token.single_word and (_is_word(text, start - 1) or _is_word(text, stop)):
                continue
            if token.lstrip:
                start = max(done, len(text[:start].rstrip(WHITE_SPACE)))
            if token.rstrip:
                stop = len(text) - len(text[stop:].lstrip(WHITE_SPACE))
            if done < start:
                yield text[done:start]
            yield token
            done = stop
        if done < len(text):
            yield text[done:]


def _is_word(text: str, at: int) -> bool:
    return 0 <= at < len(text) and bool(_WORD.match(text[at]))


def added_token_encoder(
    tokens: Iterable[AddedToken],
    normalize: Callable[[str], str],
    encode_words: Callable[[str, bool], list[int]],
) -> Callable[[str, bool, bool], list[int]]:
    """Return a function (text, parse, is_first) -> token ids.

    parse: whether names of added tokens in the text become tokens.
    is_first: whether this is the beginning of a text.
    encode_words: encodes normalized text without added tokens, given `is_first`.
    """
    tokens = list(tokens)
    raw = Splitter({token.content: token for token in tokens if not token.normalized})
    normalized = Splitter({normalize(token.content): token for token in tokens if token.normalized})

    def encode(text: str, parse: bool, is_first: bool) -> list[int]:
        ids: list[int] = []
        parts: Iterable[str | AddedToken] = raw.split(text) if parse else [text]
        for part in parts:
            if isinstance(part, AddedToken):
                ids.append(part.id)
                is_first = False
                continue
            clean = normalize(part)
            for piece in normalized.split(clean) if parse else [clean]:
                if isinstance(piece, AddedToken):
                    ids.append(piece.id)
                elif piece:
                    ids += encode_words(piece, is_first)
                is_first = False
        return ids

    return encode


def strip_around(pieces: Sequence[str | AddedToken]) -> Iterator[str | AddedToken]:
    """Drop empty strings from the pieces of a text, and the white space that lstrip or rstrip of
    neighbouring tokens take."""
    for i, piece in enumerate(pieces):
        if isinstance(piece, AddedToken):
            yield piece
            continue
        before = pieces[i - 1] if i else None
        after = pieces[i + 1] if i + 1 < len(pieces) else None
        if isinstance(before, AddedToken) and before.rstrip:
            piece = piece.lstrip(WHITE_SPACE)
        if isinstance(after, AddedToken) and after.lstrip:
            piece = piece.rstrip(WHITE_SPACE)
        if piece:
            yield piece
