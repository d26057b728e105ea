"""Symbolic lengths padded to whole tiles, which the passes can walk: see ``_tiles.symbolic``."""

from __future__ import annotations

from typing import Any

from .._masks.positions import LengthMask
from .._tiles.symbolic import as_int32, known, pad_axes, padding
from .operands import Dimensions, Operands, Quantization
from .plan import Plan


def in_whole_tiles(operands: Operands, plan: Plan) -> Operands:
    """operands with symbolic T and S padded to whole tiles; no query reads a padded key."""
    dims = Dimensions.of(operands, plan)
    missing = {
        "T": padding(dims.T, plan.blocks.q),
        "S": padding(dims.S, plan.blocks.kv),
    }
    if missing == {"T": 0, "S": 0}:
        return operands
    scores, quantization = operands.scores, operands.quantization

    def pad(x: Any, axes: str) -> Any:
        return x if x is None else pad_axes(x, axes, missing)

    mask = None if scores.mask is None else scores.mask.padded(missing)
    if not known(dims.S):
        exist = LengthMask(kv=as_int32(dims.S)[None])
        mask = exist if mask is None else mask & exist
    if quantization is not None:
        q_scale, q_shift, k_scale, k_zero, v_scale = quantization
        quantization = Quantization(
            q_scale=pad(q_scale, "BNT"),
            q_shift=pad(q_shift, "BNT"),
            k_scale=pad(k_scale, "BNS"),
            k_zero=pad(k_zero, "BNS"),
            v_scale=pad(v_scale, "BNSH"),
        )
    queries, keys = (
        "".join(layout.axes("B", "N", positions, "H"))
        for layout, positions in ((plan.layout, "T"), (plan.kv_layout, "S"))
    )
    return operands._replace(
        q=pad(operands.q, queries),
        k=pad(operands.k, keys),
        v=pad(operands.v, keys),
        scores=scores._replace(mask=mask, bias=pad(scores.bias, "BNTS")),
        quantization=quantization,
    )
