"""Options as lists and as numbers of every kind: what they give is what arrays and floats give."""

from fractions import Fraction

import jax
import numpy as np
import pytest
from jax import numpy as jnp

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
        if function is flash_attention_int8_with_lse:
            assert_equal(function(*qkv, **lists, is_causal=True), expected)
        else:
            mask = arrays["mask"]
            assert_equal(function(*qkv, **lists | {"mask": mask}, is_causal=True), expected)
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
