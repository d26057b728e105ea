"""Symbolic lengths padded to whole tiles, which the passes can walk: see ``_symbolic``."""

from __future__ import annotations

from ._masks import LengthMask
from ._operands import Dimensions, Operands, Quantization, Static
from ._symbolic import as_int32, known, pad_axes, padding


def in_whole_tiles(operands: Operands, static: Static) -> Operands:
    """operands with symbolic T and S padded to whole tiles; no query reads a padded key."""
    dims = Dimensions.of(operands, static)
    missing = {
        "T": padding(dims.T, static.blocks.q),
        "S": padding(dims.S, static.blocks.kv),
    }
    if missing == {"T": 0, "S": 0}:
        return operands
    scores, quantization = operands.scores, operands.quantization
    mask = None if scores.mask is None else scores.mask.padded(missing)
    if not known(dims.S):
        exist = LengthMask(kv=as_int32(dims.S)[None])
        mask = exist if mask is None else mask & exist
    bias = None if scores.bias is None else pad_axes(scores.bias, "BNTS", missing)
    if quantization is not None:
        axes = Quantization("BNT", "BNT", "BNS", "BNS", "BNSH")
        quantization = Quantization(
            *(
                x if x is None else pad_axes(x, names, missing)
                for x, names in zip(quantization, axes, strict=True)
            )
        )
    queries, keys = (
        "".join(x.axes(*"BN", p, "H")) for x, p in ((static.layout, "T"), (static.kv_layout, "S"))
    )
    return operands._replace(
        q=pad_axes(operands.q, queries, missing),
        k=pad_axes(operands.k, keys, missing),
        v=pad_axes(operands.v, keys, missing),
        scores=scores._replace(mask=mask, bias=bias),
        quantization=quantization,
    )
