"""Ring attention is attention of the whole sequences, in a share of their memory."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from processes import run_script
from unoptimized import ENVIRONMENT

from flash_jax import flash_attention, from_zigzag, ring_attention, to_zigzag
from flash_jax._api.zigzag import needed_rounds

CASES = (
    ("pairs", "lengths"),
    ("causal", "vmap", "masks", "dropout", "parameters", "windows", "blocks", "score_mod"),
)
THOROUGH = (
    ("one device", "broadcast dropout", "keys", "window"),
    ("one position", "bfloat16", "nothing"),
)


@pytest.mark.parametrize(
    "names",
    [*CASES, *(pytest.param(names, marks=pytest.mark.thorough) for names in THOROUGH)],
    ids=", ".join,
)
def test_a_ring_gives_what_the_unsharded_call_gives(names):
    """By the formula: the results and derivatives of both modes, on one to four devices."""
    printed = run_script("ring.py", *names, devices=4, **ENVIRONMENT)
    assert printed == f"{len(names)} passed\n", printed[-4000:]


def test_memory_is_a_share_work_is_even_and_windows_skip_rounds():
    assert run_script("ring_programs.py", devices=4) == "passed\n"


@pytest.mark.parametrize("parts", [1, 2])
def test_the_rounds_that_are_left_out_are_those_that_no_device_needs(parts, rng):
    for _ in range(60):
        n, T, S = int(rng.integers(1, 6)), *(int(x) for x in parts * rng.integers(1, 5, 2))
        left, right = (None if x == 9 else int(x) for x in rng.integers(0, 10, 2))
        causal, offset = bool(rng.integers(2)), int(rng.integers(-20, 20))
        t, s = np.arange(n * T)[:, None] + offset, np.arange(n * S)
        kept = np.full((n * T, n * S), True)
        kept &= (s <= t) if causal else True
        kept &= (s >= t - left) if left is not None else True
        kept &= (s <= t + right) if right is not None else True
        if parts == 2:
            kept = kept[np.ix_(*(to_zigzag(np.arange(size), n, axis=0) for size in kept.shape))]
        tiles = kept.reshape(n, T, n, S).any((1, 3))
        expected = tuple(r for r in range(n) if any(tiles[i, i - r] for i in range(n)))
        window = None if left is None and right is None else (left, right)
        found = needed_rounds(n, parts, T, S, causal, window, offset)
        open_ = window is None and not causal
        assert found == (tuple(range(n)) if open_ else expected)


def test_zigzag_gives_device_i_blocks_i_and_2n_minus_1_minus_i(rng):
    x = rng.standard_normal((3, 12, 2)).astype(np.float32)
    order = [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    np.testing.assert_array_equal(to_zigzag(x, 3), x[:, order])
    np.testing.assert_array_equal(from_zigzag(x[:, order], 3), x)
    np.testing.assert_array_equal(from_zigzag(to_zigzag(x, 1, axis=-1), 1, axis=-1), x)


def ring(x, *, inside=True, **options):
    attend = functools.partial(ring_attention, **{"axis_name": "seq", **options})
    if not inside:
        return attend(x, x, x)
    mesh = jax.make_mesh((1,), ("seq",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "seq")
    return jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)(x, x, x)


@pytest.mark.parametrize(
    ("length", "options", "error", "message"),
    [
        (7, {}, ValueError, "query must have an even number of positions .* it has 7"),
        (8, {"layout": "striped"}, ValueError, "layout must be 'zigzag' or 'contiguous'"),
        (
            8,
            {"axis_name": "x"},
            ValueError,
            "axis_name must be an axis .* here they are seq; .*'x'",
        ),
        (8, {"inside": False}, ValueError, "axis_name must be an axis .* here is none"),
        (
            8,
            {"axis_name": 0},
            TypeError,
            "axis_name must be a mesh axis, or a tuple of them; it is 0",
        ),
        (8, {"is_causal": 1}, TypeError, "is_causal must be a bool"),
        (8, {"bias": np.ones((8, 3), np.float32)}, ValueError, "bias must broadcast"),
        (8, {"mask": np.ones((3, 8), bool)}, ValueError, "mask must broadcast"),
        (8, {"sinks": np.ones(3, np.float32)}, ValueError, "sinks must be"),
    ],
)
def test_an_error_names_the_argument(length, options, error, message):
    with pytest.raises(error, match=message):
        ring(jnp.ones((1, length, 2, 4)), **options)


def test_an_axis_that_is_left_explicit_is_named():
    types = AxisType.Auto, AxisType.Explicit
    mesh = jax.make_mesh((1, 1), ("seq", "data"), axis_types=types)
    attend = functools.partial(ring_attention, axis_name="seq")
    spec = PartitionSpec(None, "seq")
    names = {"in_specs": spec, "out_specs": spec, "axis_names": {"seq"}}
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(NotImplementedError, match=r"axis_name must be .* data is Explicit"):
        jax.shard_map(attend, mesh=mesh, **names)(x, x, x)


@pytest.mark.parametrize(
    ("x", "devices", "axis", "error", "message"),
    [
        (np.ones((1, 6)), 2, 1, ValueError, "x must have an axis 1 that 2 \\* devices = 4 divides"),
        (np.ones((1, 6)), 2, 2, ValueError, "axis must be one of x"),
        (np.ones((1, 6)), 0, 1, ValueError, "devices must be > 0"),
        (np.ones((1, 6)), 1, 1.0, TypeError, "axis must be an integer"),
    ],
)
def test_an_error_of_zigzag_names_the_argument(x, devices, axis, error, message):
    for order in (to_zigzag, from_zigzag):
        with pytest.raises(error, match=message):
            order(x, devices, axis=axis)


def test_a_ring_without_positions_takes_no_batch_axis(x64, rng):
    """In float64, where the sequences of one device are whole."""
    x = rng.standard_normal((8, 2, 4))
    mesh = jax.make_mesh((1,), ("seq",), axis_types=(AxisType.Auto,))
    attend = functools.partial(ring_attention, axis_name="seq", layout="contiguous", is_causal=True)
    call = jax.shard_map(
        attend, mesh=mesh, in_specs=PartitionSpec("seq"), out_specs=PartitionSpec("seq")
    )
    expected = flash_attention(x, x, x, is_causal=True)
    np.testing.assert_allclose(call(x, x, x), expected, rtol=0, atol=1e-14)
