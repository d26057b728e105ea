"""What every front promises alike: the kernels and the model, in floats and in INT8."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from options import TILES, everything, random_inputs

from flash_jax import (
    BlockSparseMask,
    CausalMask,
    FlashAttentionConfig,
    LengthMask,
    PrefixMask,
    SegmentMask,
    dot_product_attention,
    flash_attention_int8,
    flash_attention_int8_with_lse,
    flash_attention_with_lse,
    flash_mha,
    flash_mha_i8,
    merge_attention,
    quantize,
    sparse_prefill,
)

# Each takes q (N, T, H), k (K, S, H) and v (K, S, Hv) of small integers, gives the output
# (N, T, Hv), and, at the level of models, lse (N, T). The logits are size * q.k. The function of
# the package, and nothing else, is wrapped: by jax.jit, which may not change a bit of it.


def kernel(q, k, v, size=1.0, blocks=TILES, causal=False, wrap=lambda f: f):
    config = FlashAttentionConfig(*blocks, q.shape[-1], causal, softmax_scale=1.0)
    return (wrap(functools.partial(flash_mha, config))(q * np.float32(size), k, v),)


def kernel_i8(
    q, k, v, size=1.0, blocks=TILES, causal=False, wrap=lambda f: f, probability_dtype="uint8"
):
    config = FlashAttentionConfig(*blocks, q.shape[-1], causal, softmax_scale=1.0)
    q, k, v = (x.astype(np.int8) for x in (q, k, v))
    attend = functools.partial(flash_mha_i8, config, probability_dtype=probability_dtype)
    return (wrap(attend)(q, k, v, size, 1.0, 1.0),)


def model(
    q,
    k,
    v,
    size=1.0,
    blocks=TILES,
    causal=False,
    wrap=lambda f: f,
    attend=flash_attention_with_lse,
):
    q, k, v = (jnp.swapaxes(x, 0, 1) for x in (q, k, v))
    attend = functools.partial(attend, is_causal=causal, block_sizes=blocks)
    out, lse = wrap(attend)(q, k, v, scale=np.float32(size))
    return jnp.swapaxes(out, 0, 1), lse


FRONTS = {
    "kernel": kernel,
    "model": model,
    "INT8 kernel": kernel_i8,
    "INT8 model": functools.partial(model, attend=flash_attention_int8_with_lse),
}
OTHER_PROBABILITIES = {
    f"INT8 kernel, {dtype}": functools.partial(kernel_i8, probability_dtype=dtype)
    for dtype in ("bfloat16", "float32")
}


def by_front(fronts):
    return pytest.mark.parametrize("front", fronts.values(), ids=fronts)


def integers(rng, N=2, K=2, T=3, S=4, H=4, Hv=2):
    shapes = (N, T, H), (K, S, H), (K, S, Hv)
    return [rng.integers(-9, 10, shape).astype(np.float32) for shape in shapes]


# --- Huge logits


@by_front(FRONTS | OTHER_PROBABILITIES)
@pytest.mark.parametrize("size", [1e30, 3e18, 1e10])
def test_huge_logits_pick_the_largest(front, size):
    q, k = np.ones((1, 5, 1), np.float32), np.arange(11, dtype=np.float32).reshape(1, 11, 1)
    v = 127 * np.eye(11, dtype=np.float32)[None]
    out = front(q, k, v, size=size, blocks=(2, 3))[0]
    np.testing.assert_allclose(out, np.broadcast_to(v[:, -1:], (1, 5, 11)), rtol=1e-6)


# --- Empty axes


@by_front(FRONTS)
@pytest.mark.parametrize("empty", [("N", "K"), "T", "S", ("Hv",)], ids="".join)
def test_an_empty_axis_gives_an_empty_or_zero_output(front, empty, rng):
    q, k, v = integers(rng, **dict.fromkeys(empty, 0))
    out, *lse = front(q, k, v)
    np.testing.assert_array_equal(out, np.zeros((*q.shape[:2], v.shape[2])))
    for x in lse:
        assert x.shape == q.shape[:2]
        assert np.isneginf(x).all() or empty == ("Hv",)


@pytest.mark.parametrize("attend", [flash_attention_with_lse, flash_attention_int8_with_lse])
@pytest.mark.parametrize(("B", "T", "S"), [(2, 0, 5), (2, 5, 0), (0, 5, 7)])
@pytest.mark.parametrize("sinks", [None, np.arange(6, dtype=np.float32)], ids=["", "sinks"])
def test_an_empty_axis_leaves_the_sinks_as_lse(attend, B, T, S, sinks, rng):
    q, k, v = random_inputs(rng, B=B, T=T, S=S)
    out, lse = attend(q, k, v, sinks=sinks, is_causal=True)
    np.testing.assert_array_equal(out, np.zeros((*q.shape[:3], v.shape[3])))
    nothing = np.full(6, -np.inf) if sinks is None else sinks
    np.testing.assert_array_equal(lse, np.broadcast_to(nothing[:, None], (B, 6, T)))


# --- The same bits every time, jitted, and with JAX's checks


@by_front(FRONTS)
def test_calls_are_bitwise_repeatable(front, rng):
    q, k, v = integers(rng, N=4, T=257, S=515, H=16)
    call = functools.partial(front, size=0.01, blocks=(64, 128), causal=True)
    first = call(q, k, v)
    # That a jitted call of the model is the eager one is in test_attention.py.
    jitted = () if front is model else (call(q, k, v, wrap=jax.jit),)
    for again in (call(q, k, v), call(q, k, v), *jitted):
        for x, y in zip(first, again, strict=True):
            np.testing.assert_array_equal(x, y)


def of_model(rng):
    options = everything(rng) | {"dropout_rate": 0.2, "dropout_rng": jax.random.key(0)}
    static = {name: options.pop(name) for name in ("is_causal", "local_window_size")}
    run = functools.partial(flash_attention_with_lse, **static, dropout_rate=0.2)
    del options["dropout_rate"]
    return lambda qkv, options: run(*qkv, **options), (random_inputs(rng), options)


def of_masks(rng):
    q_ids, kv_ids = rng.integers(0, 2, (2, 11)), np.zeros((2, 17), np.int32)
    mask = PrefixMask(np.array([0, 9])) | CausalMask(np.array([2, -3]))
    mask &= SegmentMask(q_ids, kv_ids) & LengthMask(None, np.array([13, 9]))
    return lambda qkv, mask: flash_attention_with_lse(*qkv, mask=mask), (random_inputs(rng), mask)


def of_parts(rng):
    def call(qkv, options):
        parts = [flash_attention_with_lse(*qkv, **options)] * 2
        shared = options | {"is_causal": True, "local_window_size": 3}
        drop_in = dot_product_attention(*qkv, **shared, return_residual=True)
        return merge_attention(*zip(*parts, strict=True)), drop_in

    names = "mask", "query_seq_lengths", "key_value_seq_lengths"
    options = everything(rng)
    return call, (random_inputs(rng), {name: options[name] for name in names})


def of_int8(rng):
    """In bfloat16, since float32 converts less; with everything, of a cache, and a gradient."""

    def call(qkv, options):
        static = {"is_causal": True, "local_window_size": (9, 2), "block_sizes": TILES}
        query, key, value = qkv
        cache = quantize(key, (1, 1, 1, None)), quantize(value, (1, None, 1, 1))
        return (
            flash_attention_int8_with_lse(*qkv, **options, **static),
            flash_attention_int8_with_lse(query, *cache, block_sizes=TILES),
            jax.grad(lambda q: jnp.sum(flash_attention_int8(q, key, value)))(query),
        )

    options = everything(rng)
    del options["is_causal"], options["local_window_size"]
    return call, (random_inputs(rng, dtype=jnp.bfloat16), options)


def of_blocks(rng):
    """Tables and lists, the blocks that are chosen, and a function of scores, which sees each."""

    def call(qkv, table, lists):
        mod = lambda score, b, h, q_index, k_index: score - jnp.float32(h) * jnp.abs(score)  # noqa: E731
        masks = BlockSparseMask(table, (4, 5)), BlockSparseMask.from_indices(*lists, (4, 5), 4)
        short = [x[:, :11] for x in qkv]
        chosen = [
            sparse_prefill(*short, density=0.5, method=method, block_sizes=(4, 4), **options)
            for method, options in (("pooled", {}), ("antidiagonal", {"stride": 2}), ("mincut", {}))
        ]
        kept = [
            flash_attention_with_lse(*qkv, mask=mask, score_mod=mod, block_sizes=(4, 5))
            for mask in masks
        ]
        return kept, chosen

    table = rng.random((1, 3, 3, 4)) < 0.5
    lists = np.argsort(~table, axis=-1, stable=True), np.sum(table, axis=-1)
    return call, (random_inputs(rng), table, lists)


STRICT = {
    "model": of_model,
    "masks": of_masks,
    "blocks": of_blocks,
    "merged and drop-in": of_parts,
    "INT8": of_int8,
}


def strict_modes():
    return jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")


@pytest.mark.parametrize("case", STRICT.values(), ids=STRICT)
def test_strict_modes_of_jax(case, rng):
    call, arguments = case(rng)
    expected = jax.tree.leaves(jax.jit(call)(*arguments))
    ranks, dtypes = strict_modes()
    with ranks, dtypes, jax.debug_nans(True):
        results = jax.tree.leaves(jax.jit(call)(*arguments))
    for x, y in zip(results, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@by_front({"kernel": kernel, "INT8 kernel": kernel_i8})
def test_strict_modes_of_jax_in_kernels(front, rng):
    call = functools.partial(front, size=0.1, causal=True)
    q, k, v = integers(rng, T=37, S=41)
    expected = call(q, k, v)
    ranks, dtypes = strict_modes()
    with ranks, dtypes, jax.debug_nans(True), jax.debug_infs(True):
        np.testing.assert_array_equal(call(q, k, v), expected)
