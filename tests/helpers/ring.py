"""Ring attention beside the formula, in a process with four devices: see ``test_ring.py``.

python tests/helpers/ring.py CASE...

It prints a line per failure, then how many cases passed.
"""

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from formula import formula
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from unoptimized import run

import flash_jax
from flash_jax import (
    BlockSparseMask,
    CausalMask,
    LengthMask,
    PredicateMask,
    PrefixMask,
    SegmentMask,
    flash_attention_with_lse,
    from_zigzag,
    ring_attention_with_lse,
    to_zigzag,
)

B, N, K, H, HV = 2, 4, 2, 3, 5
OUT = "BTNH", "BNT"


class Case(NamedTuple):
    """A call whose sequences lie on some devices.

    Attributes:
        devices: of the ring; two numbers are those of two axes of the mesh.
        layout: of the positions.
        T: queries on each device.
        S: keys on each device.
        options: what is compiled in.
        arrays: of the random generator and the lengths of the whole sequences: other arrays, each
            with its axes. An axis W is one of keys that is not divided.
        floats: what has derivatives.
        kinds: what is compared; see ``derivatives``.
        call: of an attention function and the arrays.
        kept: what the call's mask keeps: of the arrays, and of indices b, h, t and s of pairs.
        dtype: of query, key and value.
        data: over how many devices the batch is divided.
        vma: whether ``shard_map`` keeps account of what varies.
    """

    devices: int | tuple[int, int]
    layout: str
    T: int
    S: int
    options: dict[str, Any] = {}  # noqa: RUF012
    arrays: Callable[..., dict[str, tuple[Any, str]]] = lambda rng, T, S: {}
    floats: tuple[str, ...] = ("query", "key", "value")
    kinds: tuple[str, ...] = ("gradient",)
    call: Callable[..., Any] = lambda attend, x: attend(**x)
    kept: Callable[..., Any] | None = None
    dtype: Any = np.float32
    data: int = 1
    vma: bool = True

    @property
    def size(self):
        return int(np.prod(self.devices))


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def lengths(rng, T, S):
    return {
        "query_seq_lengths": (np.array([T - 2, 9], np.int32), "B"),
        "key_value_seq_lengths": (np.array([7, S - 4], np.int32), "B"),
        "query_offset": (np.array([-3, 11], np.int32), "B"),
    }


def parameters(rng, T, S):
    return {
        "logits_soft_cap": (np.array([1.3, 2.1], np.float32), "B"),
        "scale": (np.float32(0.4), ""),
        "alibi_slopes": (rng.random(N).astype(np.float32), "N"),
        "sinks": (floats(rng, N), "N"),
        "query_segment_ids": (np.sort(rng.integers(0, 3, (B, T))), "BT"),
        "key_value_segment_ids": (np.sort(rng.integers(1, 4, (B, S))), "BS"),
    }


def of_pairs(rng, T, S):
    return {
        "bias": (floats(rng, N, T, S), "NTW"),
        "mask": (rng.random((B, 1, 1, S)) < 0.7, "B11S"),
    }


def of_keys(rng, T, S):
    kept = rng.random((B, 1, T, S)) < 0.7
    return {"bias": (floats(rng, S), "S"), "mask": (kept, "B1TW")}


def of_masks(rng, T, S):
    return {
        "prefix": (np.array([3, 7], np.int32), "B"),
        "kv": (np.int32(S - 2), ""),
        "q_ids": (np.sort(rng.integers(0, 2, (B, T))), "BT"),
        "kv_ids": (np.sort(rng.integers(0, 2, (B, S))), "BS"),
    }


def some_pairs(b, h, q_index, k_index):
    return (q_index * 3 + k_index * 5 + h + b) % 7 != 0


def by_masks(attend, x):
    qkv = (x[name] for name in ("query", "key", "value"))
    mask = (PrefixMask(x["prefix"]) | CausalMask()) & LengthMask(kv=x["kv"])
    mask = mask & SegmentMask(x["q_ids"], x["kv_ids"]) & PredicateMask(some_pairs)
    return attend(*qkv, mask=mask)


def kept_by_masks(x, b, h, t, s):
    kept = ((s < x["prefix"][b]) | (s <= t)) & (s < x["kv"])
    return kept & (x["q_ids"][b, t] == x["kv_ids"][b, s]) & some_pairs(b, h, t, s)


def by_scores(attend, x):
    """By positions of the whole sequences, and by a table that every device has."""
    table = x["table"]

    def mod(score, b, h, q_index, k_index):
        new = score + jnp.tanh(table[h, (q_index - k_index) % 5])
        return jnp.where((q_index + k_index) % 5 == 3, -jnp.inf, new)

    return attend(x["query"], x["key"], x["value"], score_mod=mod)


TABLE = np.random.default_rng(5).random((N, 3, 6)) < 0.6


def by_blocks(attend, x):
    """The table is of the whole sequences, and blocks of it lie on two devices."""
    qkv = (x[name] for name in ("query", "key", "value"))
    return attend(*qkv, mask=BlockSparseMask(TABLE, (5, 3)), is_causal=True)


def mapped(attend, x):
    """Under vmap and remat, with keys that are shared, in a sum over which gradients meet."""
    call = lambda q: attend(q, x["key"], x["value"], is_causal=True)  # noqa: E731
    out, lse = jax.vmap(jax.checkpoint(call))(jnp.stack([x["query"], -x["query"]]))
    return out[0] + out[1], lse[0] - lse[1]


EVERY = "primal", "tangent", "gradient", "second"
DROPOUT = {"dropout_rate": 0.4, "dropout_rng": jax.random.key(3)}
CASES = {
    "causal": Case(4, "zigzag", 6, 6, {"is_causal": True, "block_sizes": (2, 3)}, kinds=EVERY),
    "one device": Case(1, "zigzag", 8, 6, {"is_causal": True}),
    "lengths": Case(3, "contiguous", 5, 7, {"is_causal": True}, lengths),
    "parameters": Case(
        2,
        "zigzag",
        12,
        10,
        {"local_window_size": (9, 4)},
        parameters,
        ("query", "key", "value", "logits_soft_cap", "scale", "alibi_slopes", "sinks"),
        ("tangent", "gradient"),
    ),
    "window": Case(4, "zigzag", 6, 6, {"is_causal": True, "local_window_size": (4, 0)}),
    "windows": Case(
        (2, 2), "contiguous", 5, 5, {"local_window_size": 4}, kinds=("primal", "tangent")
    ),
    "dropout": Case(4, "zigzag", 6, 4, {"is_causal": True, **DROPOUT}),
    "broadcast dropout": Case(3, "contiguous", 5, 3, {**DROPOUT, "broadcast_dropout": True}),
    "pairs": Case(2, "contiguous", 5, 7, {}, of_pairs, ("query", "key", "value", "bias")),
    "keys": Case(
        2, "zigzag", 6, 8, {"is_causal": True}, of_keys, ("key", "value", "bias"), vma=False
    ),
    "one position": Case(
        4, "contiguous", 1, 1, {"is_causal": True}, of_keys, ("query", "key", "bias")
    ),
    "masks": Case(3, "zigzag", 6, 8, {}, of_masks, call=by_masks, kept=kept_by_masks),
    "score_mod": Case(
        2,
        "zigzag",
        6,
        8,
        {},
        lambda rng, T, S: {"table": (floats(rng, N, 5), "N5")},
        ("query", "key", "value", "table"),
        ("tangent", "gradient"),
        by_scores,
    ),
    "blocks": Case(
        2,
        "zigzag",
        6,
        8,
        call=by_blocks,
        kept=lambda x, b, h, t, s: TABLE[h, t // 5, s // 3],
    ),
    "vmap": Case(2, "zigzag", 6, 6, call=mapped, data=2),
    "bfloat16": Case(
        4,
        "zigzag",
        6,
        6,
        {"is_causal": True},
        dtype=jnp.bfloat16,
        kinds=("tangent", "gradient"),
    ),
    "nothing": Case(2, "zigzag", 4, 4, {"is_causal": True, "query_offset": -9}, kinds=EVERY),
}


def in_order(x, axes, case, order):
    """x with its axes of positions in the order of the devices, or back."""
    if case.layout == "contiguous":
        return x
    for i, axis in enumerate(axes):
        x = order(x, case.size, axis=i) if axis in "TSW" else x
    return x


def sharded(case, axes):
    """The attention of whole arrays by the ring."""
    sizes = {"data": case.data} | {f"x{i}": n for i, n in enumerate(np.ravel(case.devices))}
    ring = tuple(sizes)[1:] if isinstance(case.devices, tuple) else "x0"
    mesh = jax.make_mesh(
        tuple(map(int, sizes.values())),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[: case.data * case.size],
    )
    over = {"T": ring, "S": ring, "B": "data" if case.data > 1 else None}
    spec = lambda axes: PartitionSpec(*map(over.get, axes))  # noqa: E731
    attend = functools.partial(
        ring_attention_with_lse, axis_name=ring, layout=case.layout, **case.options
    )
    call = jax.shard_map(
        functools.partial(case.call, attend),
        mesh=mesh,
        in_specs=({name: spec(x) for name, x in axes.items()},),
        out_specs=tuple(map(spec, OUT)),
        check_vma=case.vma,
    )

    def whole(x):
        results = call({name: in_order(x[name], axes[name], case, to_zigzag) for name in x})
        pairs = zip(results, OUT, strict=True)
        return tuple(in_order(y, axes, case, from_zigzag) for y, axes in pairs)

    return whole


def derivatives(call, case, x, weights):
    """The results, their tangents, the gradients of a weighed sum, a product with its Hessian.

    Results come with the gradients where there is no program of them alone, and a product with the
    Hessian comes with the tangents and the gradients.
    """
    given = {name: x[name] for name in case.floats}
    moving = jax.tree.map(lambda y: jnp.cos(3 * y.astype(np.float32)).astype(y.dtype), given)

    def results(given):
        out, lse = call(x | given)
        return (out, jnp.where(jnp.isneginf(lse), 0, lse)), lse

    def gradient(given):
        primals, pull_back, lse = jax.vjp(results, given, has_aux=True)
        return primals, pull_back(weights)[0], lax.stop_gradient(lse)

    found = {}
    if "primal" in case.kinds:
        found["primal"] = call(x)
    if "second" in case.kinds:
        of_both = jax.jvp(gradient, (given,), (moving,))
        found["gradient"], (found["tangent"], found["second"], _) = of_both
        return found
    if "tangent" in case.kinds:
        found["tangent"] = jax.jvp(lambda given: results(given)[0], (given,), (moving,))[1]
    if "gradient" in case.kinds:
        found["gradient"] = gradient(given)
    return found


def of_formula(case, x, T, S):
    """A function of what has derivatives, which is as the ring's; what masks stays concrete."""

    def attend(*qkv, mask=None, **options):
        if case.kept is not None:
            mask = case.kept(x, *np.ogrid[:B, :N, :T, :S])
        return formula(*qkv, mask=mask, **case.options, **options)

    if "dropout_rate" in case.options:  # which drops what the undivided call drops
        attend = functools.partial(flash_attention_with_lse, **case.options)
    call = lambda given: case.call(attend, x | given)  # noqa: E731
    return lambda given, weights: derivatives(call, case, given, weights)


def check(case):
    rng = np.random.default_rng(20180508)
    T, S = case.size * case.T, case.size * case.S
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, HV)}
    x = {name: floats(rng, *shape).astype(case.dtype) for name, shape in shapes.items()}
    others = case.arrays(rng, T, S)
    x |= {name: y for name, (y, _) in others.items()}
    axes = {"query": "BTNH", "key": "BSKH", "value": "BSKH"}
    axes |= {name: a for name, (_, a) in others.items()}
    weights = floats(rng, B, T, N, HV).astype(case.dtype), floats(rng, B, N, T)
    found = run(functools.partial(derivatives, sharded(case, axes), case), x, weights)
    given = {name: x[name] for name in case.floats}
    expected = run(of_formula(case, x, T, S), given, weights)
    eps = 1e-5 if case.dtype == np.float32 else 2e-2
    for kind, right in expected.items():
        pairs = zip(jax.tree.leaves_with_path(right), jax.tree.leaves(found[kind]), strict=True)
        for (path, y), z in pairs:
            assert y.dtype == z.dtype, (kind, path)
            y, z = (np.asarray(a, np.float64) for a in (y, z))
            size = max(1.0, np.max(np.abs(y), where=np.isfinite(y), initial=0))
            np.testing.assert_allclose(z, y, rtol=0, atol=eps * size, err_msg=f"{kind} {path}")


def main(*names):
    assert jax.device_count() == 4, flash_jax
    passed = 0
    for name in names:
        try:
            check(CASES[name])
            passed += 1
        except Exception:
            print(f"{name}:", traceback.format_exc()[-2500:])
    print(passed, "passed")


if __name__ == "__main__":
    main(*(sys.argv[1:] or CASES))
