"""What README shows does what README says."""

import re
from pathlib import Path

import jax
import numpy as np
from jax import numpy as jnp
from oracle import max_error

import flash_jax

README = (Path(__file__).parents[1] / "README.md").read_text()


def code_of(title):
    """The Python of a section."""
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))


def test_one_call_takes_the_place_of_einsums(rng):
    names = {"jax": jax, "jnp": jnp, "flash_attention": flash_jax.flash_attention}
    exec(code_of("Is it reached?"), names)
    q, k, v = (rng.standard_normal((2, 3, 7, 5)).astype(np.float32) for _ in range(3))
    padding = np.arange(7) < np.array([[4], [7]])
    expected = np.asarray(names["by_einsum"](q, k, v, padding), np.float64)
    assert max_error(names["by_one_call"](q, k, v, padding), expected) < 1e-6
