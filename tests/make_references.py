"""Store transformers' logits for `hf_cases.CASES`: python -m tests.make_references.

Needs the extra `parity`.
"""

import numpy as np

from tests.hf_cases import CASES, REFERENCES, transformers_logits

if __name__ == "__main__":
    REFERENCES.parent.mkdir(exist_ok=True)
    np.savez_compressed(REFERENCES, **{case.name: transformers_logits(case) for case in CASES})
    print(f"{REFERENCES}: {REFERENCES.stat().st_size} bytes, {len(CASES)} cases")
