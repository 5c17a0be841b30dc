import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The first call of anything in JAX compiles, which says nothing about the code under test.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers, golden texts and genuine tiny checkpoints; not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder of shared test data is not there")
    return SHARED
