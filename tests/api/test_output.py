import numpy as np
import pytest
from jax import numpy as jnp
from oracle import attention, max_error, numpy_attention, random_qkv

from flash_jax import FlashAttentionConfig, flash_attention_forward, flash_mha


def rule(T, S, causal):
    return FlashAttentionConfig.auto(5, T, S, causal=causal)


def long(T, S, causal):
    return FlashAttentionConfig.for_long_sequence(5, causal=causal)


def odd(T, S, causal):
    return FlashAttentionConfig(11, 7, 5, causal=causal)


# Every rule of tiles with every dtype, with and without a mask.
CALLS = [
    (7, 13, jnp.float32, False, [odd]),
    (7, 13, jnp.float32, True, [long]),
    (129, 257, jnp.float32, False, [rule]),
    (129, 257, jnp.float32, True, [rule, odd]),
    (129, 257, jnp.bfloat16, False, [odd]),
    (129, 257, jnp.bfloat16, True, [rule, long]),
    (129, 257, jnp.float16, False, [rule]),
    (129, 257, jnp.float16, True, [odd]),
    (1, 1, jnp.float32, False, [rule]),
    (128, 128, jnp.float32, True, [long]),
    (257, 129, jnp.float32, True, [odd]),
    (1, 301, jnp.float32, False, [rule]),
    (301, 1, jnp.float32, True, [long]),
]


def plain(q, k, v, is_causal):
    """The plain formula in the dtype of arrays with heads first."""
    inputs = (np.swapaxes(x, 0, 1)[None] for x in (q, k, v))
    out, _ = attention(*inputs, dtype=q.dtype, is_causal=is_causal)
    return np.swapaxes(out[0], 0, 1)


def names(x):
    return "+".join(f.__name__ for f in x) if isinstance(x, list) else None


@pytest.mark.parametrize(("T", "S", "dtype", "is_causal", "configs"), CALLS, ids=names)
def test_error_is_at_most_twice_that_of_plain_attention(T, S, dtype, is_causal, configs, rng):
    q, k, v = random_qkv(rng, N=6, K=3, T=T, S=S, H=5, Hv=3, dtype=dtype)
    exact, _ = numpy_attention(q, k, v, is_causal=is_causal)
    bound = 2 * max_error(plain(q, k, v, is_causal), exact) + float(jnp.finfo(dtype).eps)
    for config in (make(T, S, is_causal) for make in configs):
        out = flash_mha(config, q, k, v)
        assert out.dtype == dtype
        assert max_error(out, exact) <= bound, config


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("is_causal", [False, True])
def test_float64_is_summed_in_float64(is_causal, rng):
    q, k, v = random_qkv(rng, N=2, T=37, S=53, H=7, dtype=np.float64)
    out = flash_mha(FlashAttentionConfig(16, 11, 7, causal=is_causal), q, k, v)
    assert out.dtype == np.float64
    assert max_error(out, numpy_attention(q, k, v, is_causal=is_causal)[0]) < 1e-14


@pytest.mark.parametrize("H", [1, 17, 130])
def test_any_head_size(H, rng):
    q, k, v = random_qkv(rng, N=2, T=19, S=23, H=H)
    exact, _ = numpy_attention(q, k, v)
    bound = 2 * max_error(plain(q, k, v, False), exact) + float(jnp.finfo(np.float32).eps)
    assert max_error(flash_mha(FlashAttentionConfig(8, 16, H), q, k, v), exact) <= bound


def test_one_head_is_many_heads_of_one(rng):
    q, k, v = random_qkv(rng, N=3, T=29, S=31, H=5)
    config = FlashAttentionConfig(8, 8, 5, causal=True)
    many = flash_mha(config, q, k, v)
    for n in range(3):
        one = flash_attention_forward(config, q[n], k[n], v[n])
        np.testing.assert_allclose(one, many[n], atol=1e-6)


def test_scale_is_the_configs(rng):
    q, k, v = random_qkv(rng, N=2, T=9, S=14, H=5)
    out = flash_mha(FlashAttentionConfig(4, 4, 5, softmax_scale=2.5), q, k, v)
    assert max_error(out, numpy_attention(q, k, v, scale=2.5)[0]) < 1e-5


def test_tile_sizes_change_only_rounding(rng):
    q, k, v = random_qkv(rng, N=2, T=61, S=67, H=7)
    exact, _ = numpy_attention(q, k, v, is_causal=True)
    for block_q, block_kv in [(1, 1000), (61, 1), (5, 31), (1000, 64)]:
        out = flash_mha(FlashAttentionConfig(block_q, block_kv, 7, causal=True), q, k, v)
        assert max_error(out, exact) < 2e-6, (block_q, block_kv)


def test_the_future_cannot_change_the_past(rng):
    q, k, v = random_qkv(rng, N=2, T=53, S=53, H=3)
    config = FlashAttentionConfig(16, 8, 3, causal=True)
    before = flash_mha(config, q, k, v)
    for poison in (1e3, np.inf, np.nan):
        k2, v2 = k.copy(), v.copy()
        k2[:, 23:] = v2[:, 23:] = poison
        after = flash_mha(config, q, k2, v2)
        np.testing.assert_array_equal(before[:, :23], after[:, :23])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_visible_nonfinite_value_shows_where_it_is_visible(value, is_causal, rng):
    q, k, v = random_qkv(rng, N=2, T=31, S=31, H=3)
    v[1, 17, 2] = value
    out = np.asarray(flash_mha(FlashAttentionConfig(8, 8, 3, causal=is_causal), q, k, v))
    expected = np.zeros(out.shape, bool)
    expected[1, 17 if is_causal else 0 :, 2] = True
    np.testing.assert_array_equal(~np.isfinite(out), expected)
    np.testing.assert_array_equal(out[expected], value)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_visible_nan_key_shows(is_causal, rng):
    q, k, v = random_qkv(rng, N=1, T=31, S=31, H=3)
    k[0, 17] = np.nan
    out = np.asarray(flash_mha(FlashAttentionConfig(8, 8, 3, causal=is_causal), q, k, v))
    first = 17 if is_causal else 0
    assert np.isnan(out[0, first:]).all()
    assert np.isfinite(out[0, :first]).all()


def test_padding_never_leaks(rng):
    """The last tile overlaps the one before it, and no key counts twice."""
    q, k, v = random_qkv(rng, N=2, T=65, S=65, H=4)
    exact, _ = numpy_attention(q, k, v)
    assert max_error(flash_mha(FlashAttentionConfig(64, 64, 4), q, k, v), exact) < 1e-6


def test_equal_logits_average(rng):
    _, _, v = random_qkv(rng, N=1, T=1, S=37, H=3)
    q, k = np.full((1, 5, 3), 1e15, np.float32), np.full((1, 37, 3), 1e15, np.float32)
    out = flash_mha(FlashAttentionConfig(4, 8, 3), q, k, v)
    expected = np.broadcast_to(v.mean(axis=1, keepdims=True), out.shape)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_a_causal_row_beyond_the_keys_reads_them_all(rng):
    q, k, v = random_qkv(rng, N=1, T=41, S=5, H=3)
    out = flash_mha(FlashAttentionConfig(8, 4, 3, causal=True), q, k, v)
    assert max_error(out, numpy_attention(q, k, v, is_causal=True)[0]) < 1e-6
