"""What the README and the documentation show does what they say."""

import re
from pathlib import Path

import jax
import numpy as np
from jax import numpy as jnp
from oracle import max_error

import flash_jax

FRAMEWORKS = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text()


def code_of(title):
    """The Python of a section of the page of frameworks."""
    _, section = FRAMEWORKS.split(f"\n## {title}\n")
    section, *_ = section.split("\n## ")
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))


def test_one_call_takes_the_place_of_einsums(rng):
    names = {"jax": jax, "jnp": jnp, "flash_attention": flash_jax.flash_attention}
    exec(code_of("Is it reached?"), names)
    q, k, v = (rng.standard_normal((2, 3, 7, 5)).astype(np.float32) for _ in range(3))
    padding = np.arange(7) < np.array([[4], [7]])
    expected = np.asarray(names["by_einsum"](q, k, v, padding), np.float64)
    assert max_error(names["by_one_call"](q, k, v, padding), expected) < 1e-6


def test_a_sliding_window_of_w_keys_is_w_minus_1_to_the_left(rng):
    """Hugging Face keeps s <= t and s > t - W."""
    q, k, v = (rng.standard_normal((11, 3, 5)).astype(np.float32) for _ in range(3))
    t, s = np.ogrid[:11, :11]
    expected = flash_jax.flash_attention(q, k, v, mask=(s <= t) & (s > t - 4))
    out = flash_jax.flash_attention(q, k, v, is_causal=True, local_window_size=(4 - 1, 0))
    assert max_error(out, np.asarray(expected, np.float64)) < 1e-6


def test_causal_attention_at_an_offset_reads_no_key_beyond_the_last_query(rng):
    """Whatever stands there, NaN included; so lengths add nothing."""
    q, (k, v) = rng.standard_normal((2, 3, 6, 5)), rng.standard_normal((2, 2, 13, 2, 5))
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    offset = np.array([4, 7])
    beyond = np.arange(13) >= offset[:, None] + 3
    options = {"is_causal": True, "query_offset": offset}
    lengths = {"key_value_seq_lengths": offset + 3}
    expected = flash_jax.flash_attention(q, k, v, **options, **lengths)
    k, v = (np.where(beyond[..., None, None], np.nan, x) for x in (k, v))
    out = flash_jax.flash_attention(q, k, v, **options)
    assert max_error(out, np.asarray(expected, np.float64)) < 1e-6


def test_float16_under_jit_and_differentiated(rng):
    q, k, v = (rng.standard_normal((7, 3, 5)).astype(np.float16) for _ in range(3))

    def loss(q):
        return jnp.sum(flash_jax.flash_attention(q, k, v[..., :4]).astype(np.float32))

    value, gradient = jax.jit(jax.value_and_grad(loss))(q)
    assert np.isfinite(value)
    assert gradient.dtype == np.float16
