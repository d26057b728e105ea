"""Straight-through derivatives: a rounded function with the derivatives of a smooth one.

Bengio et al., Estimating or propagating gradients through stochastic neurons, 2013, section 4,
https://arxiv.org/abs/1308.3432
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero


def straight_through(
    static: tuple[Any, ...], rounded: Callable[..., Any], smooth: Callable[..., Any], *arrays: Any
) -> Any:
    """``rounded(*static, *arrays)``, with the derivatives of ``smooth`` in the arrays that move."""

    @jax.custom_jvp
    def call(*arrays: Any) -> Any:
        return rounded(*static, *arrays)

    def rule(primals: tuple, tangents: tuple) -> tuple:
        leaves, tree = jax.tree.flatten(primals)
        moving = {
            i: x
            for i, x in enumerate(jax.tree.leaves(tangents))
            if not isinstance(x, SymbolicZero) and x.dtype != jax.dtypes.float0
        }

        def of_moving(*xs: Any) -> Any:
            replaced = dict(zip(moving, xs, strict=True))
            new = [replaced.get(i, x) for i, x in enumerate(leaves)]
            return smooth(*static, *jax.tree.unflatten(tree, new))

        # Named as the results of attention are, for the policies of ``jax.checkpoint``.
        results = jax.tree.map(lambda x: checkpoint_name(x, "flash_attention"), call(*primals))
        if not moving:
            return results, jax.tree.map(jnp.zeros_like, results)
        still = tuple(leaves[i] for i in moving)
        return results, jax.jvp(of_moving, still, tuple(moving.values()))[1]

    call.defjvp(rule, symbolic_zeros=True)
    return call(*arrays)
