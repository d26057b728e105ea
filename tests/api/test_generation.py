"""A decoder that reads caches generates the tokens of one that has none."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from flash_jax import KVCache, PagedKVCache, attend

B, LAYERS, D, N, K, H, VOCABULARY = 3, 2, 24, 4, 2, 8, 19
PROMPTS, STEPS, WINDOW = (7, 2, 5), 13, 6
LENGTH = max(PROMPTS) + STEPS


def parameters(rng):
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), np.float32)  # noqa: E731
    layers = [
        {name: draw(D, n * H) / D**0.5 for name, n in (("q", N), ("k", K), ("v", K))}
        | {"out": draw(N * H, D) / (N * H) ** 0.5}
        for _ in range(LAYERS)
    ]
    return {"embedding": draw(VOCABULARY, D), "layers": layers}


def rotated(x, position):
    """RoPE of x (B, T, heads, H) at positions (B, T)."""
    angle = position[..., None, None] * 10.0 ** -jnp.arange(0, 4, 8 / H)[: H // 2]
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def logits(parameters, tokens, position, attention):
    """Of every token; attention(layer, q, k, v) is called for every layer."""
    x = parameters["embedding"][tokens]
    for i, layer in enumerate(parameters["layers"]):
        y = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))
        q, k, v = (jnp.reshape(y @ layer[name], (*y.shape[:2], -1, H)) for name in "qkv")
        out = attention(i, rotated(q, position), rotated(k, position), v)
        x = x + out.reshape(*x.shape[:2], -1) @ layer["out"]
    return x @ parameters["embedding"].T


def generated_without_a_cache(parameters, prompts, window):
    """By jax.nn, of whole sequences, whose ends no token reads."""
    sides = None if window is None else (window - 1, 0)
    position = jnp.broadcast_to(jnp.arange(LENGTH), (B, LENGTH))

    def attention(_, q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=sides)

    row, lengths = jnp.arange(B), jnp.array(PROMPTS)

    def step(i, tokens):
        of_last = logits(parameters, tokens, position, attention)[row, lengths + i - 1]
        return tokens.at[row, lengths + i].set(jnp.argmax(of_last, axis=-1))

    tokens = jnp.pad(prompts, ((0, 0), (0, STEPS)))
    return lax.fori_loop(0, STEPS, step, tokens)[row[:, None], lengths[:, None] + jnp.arange(STEPS)]


def generated(parameters, prompts, caches):
    """The prompts at once, and then a token after the other."""

    def read(caches, tokens, lengths):
        after = list(caches)
        position = caches[0].lengths[:, None] + jnp.arange(tokens.shape[1])

        def attention(i, q, k, v):
            after[i] = after[i].append(k, v, lengths)
            return attend(q, after[i])

        return logits(parameters, tokens, position, attention), after

    def step(carry):
        i, caches, token, out = carry
        out = out.at[:, i].set(token)
        of_token, caches = read(caches, token[:, None], jnp.ones(B, jnp.int32))
        return i + 1, caches, jnp.argmax(of_token[:, 0], axis=-1), out

    lengths = jnp.array(PROMPTS)
    of_prompts, caches = read(caches, prompts, lengths)
    first = jnp.argmax(of_prompts[jnp.arange(B), lengths - 1], axis=-1)
    carry = 0, caches, first, jnp.zeros((B, STEPS), first.dtype)
    return lax.while_loop(lambda carry: carry[0] < STEPS, step, carry)[-1]


CACHES = {
    "full": lambda: KVCache.empty(B, LENGTH, K, H),
    "window": lambda: KVCache.empty(B, WINDOW + max(PROMPTS) - 1, K, H, window=WINDOW),
    "pages": lambda: PagedKVCache.empty(B, LENGTH, K, H, pages=16, page_size=4),
    "int8": lambda: KVCache.empty(B, LENGTH, K, H, dtype="int8"),
}


@pytest.mark.parametrize("kind", CACHES)
def test_the_tokens_are_those_of_a_decoder_without_a_cache(kind, rng):
    model = parameters(rng)
    prompts = jnp.asarray(rng.integers(0, VOCABULARY, (B, max(PROMPTS))))
    caches = [CACHES[kind]() for _ in range(LAYERS)]
    window = WINDOW if kind == "window" else None
    mine = jax.jit(generated)(model, prompts, caches)
    plain = jax.jit(generated_without_a_cache, static_argnums=2)(model, prompts, window)
    assert len(np.unique(plain)) > 4
    if kind == "int8":  # rounded: the first tokens, on which the others depend
        np.testing.assert_array_equal(mine[:, :3], plain[:, :3])
    else:
        np.testing.assert_array_equal(mine, plain)
