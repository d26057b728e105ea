"""Options as lists, as numbers of every kind, and per batch element: they give what is expected of
arrays, floats, and one call per element.
"""

from fractions import Fraction

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from oracle import assert_within_bound, attention
from unoptimized import UNOPTIMIZED

import flash_jax
from flash_jax import (
    CausalMask,
    FlashAttentionConfig,
    LengthMask,
    PrefixMask,
    SegmentMask,
    WindowMask,
    dot_product_attention,
    flash_attention,
    flash_attention_forward_i8,
    flash_attention_int8_with_lse,
    flash_attention_with_lse,
    reference_attention,
)

B, T, S, N, H = 2, 5, 7, 6, 4


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def random_qkv(rng):
    return floats(rng, B, T, N, H), floats(rng, B, S, N // 2, H), floats(rng, B, S, N // 2, 3)


def options(rng):
    """Every option that may be an array, as one."""
    return {
        "bias": floats(rng, N, 1, S),
        "mask": rng.random((T, S)) < 0.8,
        "scale": np.float32([0.3, -0.7]),
        "query_seq_lengths": np.int32([5, 3]),
        "key_value_seq_lengths": np.int32([6, 7]),
        "query_offset": np.int32([4, 1]),
        "query_segment_ids": rng.integers(0, 2, (B, T)),
        "key_value_segment_ids": rng.integers(0, 2, (B, S)),
        "logits_soft_cap": np.float32([2, 30]),
        "sinks": floats(rng, N),
        "alibi_slopes": floats(rng, B, N),
    }


def assert_equal(results, expected):
    jax.tree.map(np.testing.assert_array_equal, results, expected)


@pytest.mark.parametrize("function", [flash_attention_with_lse, flash_attention_int8_with_lse])
def test_lists_are_arrays(function, rng):
    qkv, arrays = random_qkv(rng), options(rng)
    expected = function(*qkv, **arrays, is_causal=True)
    as_tuple = {"query_offset": tuple(arrays["query_offset"].tolist())}
    lists = {name: x.tolist() for name, x in arrays.items()} | as_tuple
    with jax.no_tracing():  # they are one argument each, too: nothing is compiled for them
        assert_equal(function(*qkv, **lists, is_causal=True), expected)


def test_lists_are_arrays_in_the_drop_in_and_the_plain_formula(rng):
    qkv = random_qkv(rng)
    arrays = {
        name: x for name, x in options(rng).items()
        if name in ("bias", "mask", "scale", "query_seq_lengths", "key_value_seq_lengths")
    }  # fmt: skip
    lists = {name: x.tolist() for name, x in arrays.items()}
    assert_equal(dot_product_attention(*qkv, **lists), dot_product_attention(*qkv, **arrays))
    results = (reference_attention(*qkv, scale=x["scale"]) for x in (lists, arrays))
    assert_equal(next(results), next(results))


def test_lists_are_arrays_in_masks(rng):
    qkv = random_qkv(rng)
    ids = rng.integers(0, 2, T).tolist(), rng.integers(0, 2, (B, S)).tolist()

    def mask(kind):
        mask = SegmentMask(*map(kind, ids)) | (
            CausalMask(kind([1, 0])) & LengthMask(kv=kind([6, 7]))
        )
        return mask | (PrefixMask(kind([0, 2])) & WindowMask(1, None, kind([2, 1])))

    expected = flash_attention(*qkv, mask=mask(np.array))
    assert jax.tree.structure(mask(list)) == jax.tree.structure(mask(np.array))
    assert_equal(flash_attention(*qkv, mask=mask(list)), expected)


def test_lists_may_hold_traced_numbers(rng):
    qkv = random_qkv(rng)

    def call(offset, scale):
        return flash_attention(*qkv, is_causal=True, query_offset=[offset, 1], scale=[scale, 0.5])

    assert_equal(jax.jit(call)(3, 0.25), call(3, 0.25))
    assert_equal(call(jnp.int32(3), np.float32(0.25)), call(3, 0.25))


PER_ELEMENT = {
    "scale": np.float32([0.3, -0.7]),
    "logits_soft_cap": np.float32([0.5, 30]),
    "sinks": np.linspace(-2, 3, B * N, dtype=np.float32).reshape(B, N),
    "alibi_slopes": np.linspace(0, 1, B * N, dtype=np.float32).reshape(B, N),
}


def element(b, qkv, options):
    return [x[b] for x in qkv], {name: x[b] for name, x in options.items()}


def joined(results):
    return [np.stack(x) for x in zip(*results, strict=True)]


@pytest.mark.parametrize("names", [*([name] for name in PER_ELEMENT), list(PER_ELEMENT)], ids=str)
def test_each_batch_element_has_its_own(names, rng):
    qkv, options = random_qkv(rng), {name: PER_ELEMENT[name] for name in names}
    exact, plain = (
        joined(attention(*x, dtype=dtype, **own) for x, own in
               (element(b, qkv, options) for b in range(B)))
        for dtype in (None, np.float32)
    )  # fmt: skip
    assert_within_bound(flash_attention_with_lse(*qkv, **options), exact, plain, np.float32)


@pytest.mark.parametrize("function", [flash_attention_with_lse, flash_attention_int8_with_lse])
def test_each_batch_element_has_the_results_and_derivatives_of_a_call_of_its_own(function, rng):
    qkv = random_qkv(rng)

    def loss(options, qkv):
        out, lse = function(*qkv, **options)
        return jnp.sum(out * jnp.cos(jnp.arange(3.0))) + jnp.sum(lse), (out, lse)

    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=UNOPTIMIZED)
    gradients, results = run(PER_ELEMENT, qkv)
    alone = [run(*element(b, qkv, PER_ELEMENT)[::-1]) for b in range(B)]
    expected = jax.tree.map(lambda *x: np.stack(x), *alone)
    for x, y in zip(jax.tree.leaves((gradients, results)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_each_batch_element_has_its_own_scale_in_the_plain_formula(rng):
    qkv, scale = random_qkv(rng), PER_ELEMENT["scale"]
    alone = [reference_attention(*(x[b] for x in qkv), scale=scale[b]) for b in range(B)]
    np.testing.assert_allclose(reference_attention(*qkv, scale=scale), alone, rtol=1e-6, atol=1e-6)


NUMBERS = [Fraction(1, 2), np.float16(0.5), np.array(Fraction(1, 2)), jnp.bfloat16(0.5)]


@pytest.mark.parametrize(
    "function",
    [
        flash_attention_with_lse,
        flash_attention_int8_with_lse,
        dot_product_attention,
        reference_attention,
    ],
)
def test_numbers_of_every_kind_are_a_scale(function, rng):
    qkv = random_qkv(rng)
    expected = function(*qkv, scale=0.5)
    for number in NUMBERS:
        assert_equal(function(*qkv, scale=number), expected)
    assert_equal(function(*qkv, scale=[Fraction(1, 2)] * B), expected)
    assert_equal(function(*qkv, scale=2**40), function(*qkv, scale=2.0**40))


def test_numbers_of_every_kind_are_a_soft_cap(rng):
    qkv = random_qkv(rng)
    expected = flash_attention(*qkv, logits_soft_cap=0.5)
    for number in NUMBERS:
        assert_equal(flash_attention(*qkv, logits_soft_cap=number), expected)
    large, exact = (flash_attention(*qkv, logits_soft_cap=x) for x in (2**70, 2.0**70))
    assert_equal(large, exact)


def test_numbers_of_every_kind_are_scales_of_the_kernels():
    config = FlashAttentionConfig(5, 7, 4, softmax_scale=Fraction(1, 4))  # pyright: ignore
    assert config == FlashAttentionConfig(5, 7, 4, softmax_scale=0.25)
    x = np.ones((5, 4), np.int8)
    expected = flash_attention_forward_i8(config, x, x, x, 0.5, 2.0, 2.0**40)
    out = flash_attention_forward_i8(config, x, x, x, Fraction(1, 2), 2, 2**40)  # pyright: ignore
    assert_equal(out, expected)


def test_the_largest_ids_are_told_apart_or_refused():
    """Numbers of 64 bits, which JAX would cut to 32."""
    qkv = [np.ones((T, N, H), np.float32)] * 3
    ids = np.arange(T) + 2**32
    with pytest.raises(ValueError, match=r"query_segment_ids must fit into int32; it is \d+"):
        flash_attention(*qkv, query_segment_ids=ids, key_value_segment_ids=ids)
    with pytest.raises(ValueError, match=r"SegmentMask\.q_ids must fit into int32"):
        SegmentMask(ids, ids)
    with jax.enable_x64(True):
        kept = flash_jax.SegmentMask(ids, ids - 2**32).to_array(T, T)
    assert not kept.any()
