"""Gradients of every operand, with every option, are exact."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from derivatives import (
    assert_gradients,
    check,
    floats,
    gradients,
    optimized,
    pairs_of,
    plain_gradients,
    random_call,
    random_cotangents,
    unoptimized,
)
from hypothesis import strategies as st
from jax import numpy as jnp
from options import (
    BIASES,
    TILES,
    B,
    H,
    Hv,
    K,
    N,
    S,
    T,
    everything,
    int32,
    masking_bias,
    named,
    random_mask,
    segments,
    split,
)
from unoptimized import run

from flash_jax import (
    CausalMask,
    FlashAttentionConfig,
    LengthMask,
    PrefixMask,
    WindowMask,
    dot_product_attention,
    flash_attention,
    flash_attention_forward,
    flash_mha,
)


@named(
    *("none", *BIASES, "bias of keys", "bias of -inf", "parameters", "mask of keys"),
    *("window open right", "lengths and sinks", "segments", "everything"),
)
def test_gradients_of_every_option_are_exact(options, rng):
    run = optimized if options is everything else unoptimized
    check(rng, random_call(rng) | options(rng) | {"block_sizes": TILES}, run=run)


def test_gradients_of_mask_objects_are_exact(rng):
    n, offset, lengths = int32(4, 9), int32(5, -2), int32(13, 8)
    mask = (PrefixMask(n) | CausalMask(offset)) & LengthMask(None, lengths) & WindowMask(9, 8)
    t, s = np.arange(T)[:, None], np.arange(S)
    n, offset, lengths = (x[:, None, None, None] for x in (n, offset, lengths))
    kept = ((s < n) | (s <= t + offset)) & (s < lengths) & (s >= t - 9) & (s <= t + 8)
    call = random_call(rng) | {"mask": mask, "block_sizes": TILES}
    check(rng, call, np.broadcast_to(kept, (B, N, T, S)), run=unoptimized)


@pytest.mark.parametrize("blocks", [(8, 16), None])
def test_gradients_are_exact_with_tiles_of_any_size(blocks, rng):
    run = unoptimized if blocks else optimized
    check(rng, random_call(rng) | everything(rng) | {"block_sizes": blocks}, run=run)


@named("segments", "everything")
def test_gradients_of_bfloat16_are_exact(options, rng):
    run = optimized if options is everything else unoptimized
    call = random_call(rng, dtype=jnp.bfloat16) | options(rng) | {"block_sizes": TILES}
    check(rng, call, run=run)


@pytest.mark.usefixtures("x64")
def test_gradients_of_float64_are_exact(rng):
    options = everything(rng, dtype=np.float64)
    call = random_call(rng, dtype=np.float64) | options | {"block_sizes": TILES}
    check(rng, call, run=unoptimized)


@pytest.mark.parametrize(
    ("T", "S", "N", "K"),
    [(1, 67, 4, 1), (67, 1, 6, 3), (61, 67, 1, 1), (257, 131, 16, 8)],
)
def test_gradients_are_exact_for_any_lengths_and_groups(T, S, N, K, rng):
    call = random_call(rng, T=T, S=S, N=N, K=K)
    call |= {"is_causal": True, "query_offset": int32(S - T, S // 2)}
    check(rng, call, run=optimized if T > 256 else unoptimized)


@pytest.mark.parametrize("sizes", [(2, 0, 5), (2, 5, 0), (0, 5, 7)])
def test_gradients_of_empty_arrays_are_zero(sizes, rng):
    call = random_call(rng, *sizes) | {"is_causal": True}
    for x in gradients(call, random_cotangents(rng, call)).values():
        assert not np.any(x)


def test_dropout_drops_the_same_in_both_passes(rng):
    dropout = {"dropout_rate": 0.4, "dropout_rng": jax.random.key(3), "block_sizes": TILES}
    q, k = np.zeros((B, T, N, 1), np.float32), np.zeros((B, S, 1, 1), np.float32)
    eye = np.broadcast_to(np.eye(S, dtype=np.float32)[None, :, None], (B, S, 1, S))
    factors = np.where(np.swapaxes(flash_attention(q, k, eye, **dropout), 1, 2) > 0, 1 / 0.6, 0)
    assert 0.5 < np.mean(factors > 0) < 0.7
    call = random_call(rng) | {"is_causal": True, "sinks": floats(rng, N)} | dropout
    check(rng, call, dropout=factors, run=unoptimized)


# --- The other functions


def heads_last(*arrays):
    return [np.swapaxes(x[None] if x.ndim == 3 else x[None, None], 1, 2) for x in arrays]


@pytest.mark.parametrize("heads", [(), (N,)])
def test_gradients_of_the_kernels_are_exact(heads, rng):
    """(T, H) of one causal head, (N, T, H) of many with groups."""
    kernel = flash_mha if heads else flash_attention_forward
    config = FlashAttentionConfig(*TILES, H, causal=not heads, softmax_scale=0.7)
    lead = (K,) if heads else ()
    shapes = (*heads, T, H), (*lead, S, H), (*lead, S, Hv), (*heads, T, Hv)
    q, k, v, d_out = (floats(rng, *shape) for shape in shapes)
    pull = lambda qkv, d_out: jax.vjp(functools.partial(kernel, config), *qkv)[1](d_out)  # noqa: E731
    results = heads_last(*run(pull, (q, k, v), d_out))
    names = "query", "key", "value"
    inputs = dict(zip(names, heads_last(q, k, v), strict=True))
    call = inputs | {"scale": np.float32(0.7), "is_causal": not heads}
    assert_exact_without_lse(call, dict(zip(names, results, strict=True)), heads_last(d_out)[0])


def assert_exact_without_lse(call, results, d_out):
    pairs, (_, T, N, _) = pairs_of(call), call["query"].shape
    cotangents = d_out, np.zeros((len(d_out), N, T), np.float32)
    plain = plain_gradients(split(call)[0], pairs, cotangents)
    assert_gradients(call, results, plain, cotangents, pairs)


def test_gradients_of_dot_product_attention_are_exact_and_its_residual_has_none(rng):
    call = random_call(rng) | {"bias": floats(rng, 1, N, T, S), "scale": np.float32(0.4)}
    options = {"is_causal": True, "local_window_size": (3, 0), "query_seq_lengths": int32(T, 4)}
    d_out, _ = random_cotangents(rng, call)

    def pull(differentiable, cotangents):
        attend = functools.partial(dot_product_attention, **options, return_residual=True)
        return jax.vjp(lambda x: attend(**x), differentiable)[1](cotangents)[0]

    results = run(pull, call, (d_out, np.full((B, T, N), 1e3, np.float32)))
    assert_exact_without_lse(call | options, results, d_out)


# --- Random combinations


@st.composite
def random_calls(draw):
    """Of few programs, each of which takes all traced options, and a seed for their values."""
    sizes, static = draw(
        st.sampled_from(
            [
                ((2, 7, 13, 6, 3), {"is_causal": True, "block_sizes": (8, 16)}),
                ((1, 17, 11, 4, 1), {"local_window_size": (4, None), "block_sizes": TILES}),
            ]
        )
    )
    bits = st.lists(st.booleans(), min_size=4, max_size=4)
    return sizes, static, draw(bits), draw(st.integers(0, 2**32 - 1))


@hypothesis.settings(derandomize=True, deadline=None, max_examples=16, database=None)
@hypothesis.given(random_calls())
def test_gradients_of_any_options_together_are_exact(drawn):
    (B, T, S, N, K), static, (biased, lengths, packed, masked), seed = drawn
    rng = np.random.default_rng(seed)
    traced = {
        "bias": (masking_bias if biased else floats)(rng, B, 1, T, S),
        "mask": random_mask(rng, N, T, S) if masked else np.full((N, T, S), True),
        "query_seq_lengths": rng.integers(0, T + 1, B, np.int32) if lengths else int32(*[T] * B),
        "key_value_seq_lengths": rng.integers(0, S + 1, B, np.int32),
        "query_offset": rng.integers(-T, S + 3, B, np.int32),
        "scale": np.float32(rng.normal()),
        "logits_soft_cap": np.float32(rng.uniform(0.5, 9)),
        "sinks": floats(rng, N),
        "alibi_slopes": rng.random(N).astype(np.float32),
        **segments(rng, B, T, S),
    }
    if not packed:
        traced |= {name: np.zeros_like(traced[name]) for name in segments(rng, B, T, S)}
    check(rng, random_call(rng, B, T, S, N, K) | traced | static, run=unoptimized)
