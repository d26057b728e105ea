"""Fixed point has the bits of its specification, however it is compiled, and its error bound."""

import functools
import zlib

import jax
import numpy as np
import pytest
import q15_reference
from jax import export
from jax import numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from flash_jax import PrefixMask, WindowMask, flash_attention_q15, from_q15, to_q15

B, T, S, N, K, H, Hv = 2, 19, 37, 6, 3, 20, 7
CAUSAL = np.tri(T, S, 5, dtype=bool)


def integers(rng, *shape, low=-(2**15), high=2**15):
    return rng.integers(low, high, shape).astype(np.int16)


def inputs(rng):
    return integers(rng, B, T, N, H), integers(rng, B, S, K, H), integers(rng, B, S, K, Hv)


def kept(lengths):
    return np.arange(S) < np.array(lengths)[:, None, None, None]


# Options, and what they keep; scales from one that leaves nothing of the logits to the largest.
CASES = {
    "plain": ({}, True),
    "sharp": ({"scale": 500.0}, True),
    "flat": ({"scale": 1e-9}, True),
    "causal in tiles": ({"is_causal": True, "query_offset": 5, "block_sizes": (8, 16)}, CAUSAL),
    "lengths": ({"key_value_seq_lengths": [23, 0], "block_sizes": (5, 7)}, kept([23, 0])),
    "Mask": (
        {"mask": PrefixMask(3) | WindowMask(2, 4), "block_sizes": (16, 8)},
        (np.arange(S) < 3) | ((np.tri(T, S, 4) - np.tri(T, S, -3)) > 0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_the_specification(case, rng):
    options, keep = CASES[case]
    arrays = inputs(rng)
    right = q15_reference.attention(*arrays, keep, options.get("scale"))
    out = flash_attention_q15(*arrays, **options)
    assert out.dtype == np.int16
    np.testing.assert_array_equal(out, right)
    assert len(np.unique(right)) > 30


def test_the_bits_are_always_the_same():
    """A fixed number: of every machine, of every version of JAX."""
    x = (np.arange(3 * 64 * 4 * 16) * 40503 % 2**16).astype(np.uint16).view(np.int16)
    query, key, value = x.reshape(3, 1, 64, 4, 16)
    outputs = [
        flash_attention_q15(query, key, value, is_causal=True, block_sizes=sizes)
        for sizes in (None, (16, 24))
    ]
    assert {zlib.crc32(np.asarray(out).tobytes()) for out in outputs} == {2922738412}


@pytest.mark.parametrize("number", [-(2**15), 2**15 - 1])
def test_no_sum_overflows_at_the_largest_sizes(number):
    """Of 65536 keys, all alike and as large as can be, and of heads of 256."""
    query = np.full((1, 2, 1, 256), -(2**15), np.int16)
    key = np.broadcast_to(query[:, :1], (1, 2**16, 1, 256))
    value = np.full((1, 2**16, 1, 1), number, np.int16)
    run = jax.jit(functools.partial(flash_attention_q15, scale=40.0, block_sizes=(2, 2**14)))
    assert run(query, key, value).ravel().tolist() == [number, number]
    # One key is next to nothing, and all others are nothing.
    other = key.copy()
    other[:, 77] = 2**15 - 1
    assert run(-query - 1, other, value).ravel().tolist() == [number, number]


@pytest.mark.parametrize("scale", [None, 0.05, 1.0])
def test_the_error_is_within_the_bound(scale, rng):
    S = 301
    query, key = integers(rng, 1, 31, 2, 32), integers(rng, 1, S, 2, 32)
    value = integers(rng, 1, S, 2, 5)
    out = from_q15(flash_attention_q15(query, key, value, scale=scale))
    q, k, v = (np.moveaxis(x.astype(np.float64), 2, 1) / 2**15 for x in (query, key, value))
    s = q @ k.swapaxes(2, 3) * (1 / np.sqrt(32) if scale is None else scale)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    l = p.sum(axis=-1, keepdims=True)
    error = np.abs(np.moveaxis(out, 2, 1) - p @ v / l)
    bound = 2**-16 + (2**-16 + S * 2**-23 / (l * 0.99)) * np.max(np.abs(v))
    assert np.all(error <= bound)


def test_transformations_change_no_bit(rng):
    query, key, value = inputs(rng)
    call = functools.partial(flash_attention_q15, is_causal=True, block_sizes=(8, 16))
    right = np.asarray(call(query, key, value))
    two = jax.jit(jax.vmap(call, in_axes=(0, None, None)))(
        np.stack([query, query[::-1]]), key, value
    )
    np.testing.assert_array_equal(two[0], right)
    np.testing.assert_array_equal(two[1], call(query[::-1], key, value))
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("x")
    sharded = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_array_equal(sharded(query, key, value), right)
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        np.testing.assert_array_equal(call(query, key, value), right)
    alone = call(query[0], key[0], value[0])
    np.testing.assert_array_equal(alone, right[0])


def test_an_exported_program_takes_every_batch_size(rng):
    query, key, value = inputs(rng)
    (b,) = export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((b, *x.shape[1:]), np.int16) for x in (query, key, value)]
    exported = export.export(jax.jit(flash_attention_q15))(*shapes)
    right = flash_attention_q15(query, key, value)
    np.testing.assert_array_equal(exported.call(query, key, value), right)
    (t,) = export.symbolic_shape("t")
    shapes = [jax.ShapeDtypeStruct((1, t, *x.shape[2:]), np.int16) for x in (query, key, value)]
    with pytest.raises(NotImplementedError, match="may be symbolic in B only"):
        export.export(jax.jit(flash_attention_q15))(*shapes)


def test_conversions_saturate():
    x = jnp.array([0.5, -1.0, 1.0, -7.0, np.inf, -np.inf, np.nan, 1.5 * 2**-15, -(2**-17)])
    found = to_q15(x).tolist()
    assert found == [16384, -32768, 32767, -32768, 32767, -32768, 0, 2, 0]
    every = np.arange(-(2**15), 2**15).astype(np.int16)
    np.testing.assert_array_equal(to_q15(from_q15(every)), every)
    np.testing.assert_array_equal(to_q15(from_q15(every, "bfloat16")[::256]), every[::256])


def test_there_is_no_derivative(rng):
    def loss(x):
        x = to_q15(x)
        return jnp.sum(from_q15(flash_attention_q15(x, x, x)))

    with pytest.raises(NotImplementedError, match="to_q15 has no derivative, nor has flash_att"):
        jax.grad(loss)(jnp.ones((1, 3, 2, 4)))


def call(**options):
    x = np.zeros((1, 3, 2, 4), np.int16)
    return flash_attention_q15(**{"query": x, "key": x, "value": x} | options)


REFUSED = {
    "query must be int16; its dtype is float32": {"query": np.zeros((1, 3, 2, 4), np.float32)},
    "scale must be a number, known at trace time": {"scale": np.ones(2)},
    "scale must be > 0, and at most 2838.96": {"scale": 2840},
    "query must have a head size of at most 256; it is 257": dict.fromkeys(
        ("query", "key"), np.zeros((1, 3, 2, 257), np.int16)
    ),
    "key must have at most 65536 positions; it has 65537": dict.fromkeys(
        ("key", "value"), np.zeros((1, 65537, 2, 4), np.int16)
    ),
    "value must be .* Hv": {"value": np.zeros((1, 2, 2, 4), np.int16)},
}


@pytest.mark.quick
@pytest.mark.parametrize("message", REFUSED)
def test_errors_name_the_argument(message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(**REFUSED[message])
