"""For the tests of the benchmark."""

from pathlib import Path

import pytest
from small_bench import fake

from flash_jax._cli.bench import measure

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture
def fakes(monkeypatch):
    """Workers find the fake subjects; what bounds a case is one of them, too."""
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    monkeypatch.setattr(measure, "MACHINE", fake("right"))
