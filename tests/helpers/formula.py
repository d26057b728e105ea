"""The formula with every score at once, in the place of a call of ``flash_attention_with_lse``.

What calls on several devices are held to: its program compiles in a fifth of the time that the
undivided call takes, which other tests hold to the same formula.
"""

import numpy as np
from derivatives import MASKING, pairs_of, plain_attention


def formula(query, key, value, *, block_sizes=None, score_mod=None, **options):
    """Output and lse of any options but dropout; what masks is concrete, all else may be traced.

    mask: bool, broadcastable to (B, N, T, S); a Mask as what it keeps.
    logits_soft_cap: a scalar, or (B,).
    """
    masking = {name: options.pop(name) for name in MASKING if name in options}
    pairs = pairs_of({"query": query, "key": key, **masking})
    cap = options.pop("logits_soft_cap", None)
    if np.ndim(cap):
        cap = cap[:, None, None, None]
    floats = {"query": query, "key": key, "value": value, "logits_soft_cap": cap, **options}
    return plain_attention(floats, *pairs, score_mod)
