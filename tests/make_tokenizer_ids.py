"""Store the tokenizers library's ids of texts for each tokenizer.json of `tokenizer_forms`, and
the texts that it decodes them to: python -m tests.make_tokenizer_ids.

Needs the extra `parity`.
"""

import json
from pathlib import Path

from tests.tokenizer_forms import FORMS, with_specials

PATH = Path(__file__).parent / "references" / "tokenizer_ids.json"


def main() -> None:
    from tokenizers import Tokenizer

    found = {}
    for name, make in FORMS.items():
        content = make()
        reference = Tokenizer.from_str(json.dumps(content))
        ids = [reference.encode(text).ids for text in with_specials(content)]
        found[name] = [[each, reference.decode(each)] for each in ids]
    rows = [f"{json.dumps(name)}: {json.dumps(pairs)}" for name, pairs in found.items()]
    PATH.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
