"""Ring attention beside the formula, in a process with four devices: see ``test_ring.py``.

python tests/helpers/ring.py CASE...

It prints a line per failure, then how many cases passed.
"""

import functools
import sys
import traceback

import jax
import numpy as np
from formula import formula
from garbage import collect_seldom
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from ring_cases import CASES, HV, B, H, K, N, floats
from unoptimized import run

import flash_jax
from flash_jax import (
    flash_attention_with_lse,
    from_zigzag,
    ring_attention_with_lse,
    to_zigzag,
)

OUT = "BTNH", "BNT"


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
    collect_seldom()
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
