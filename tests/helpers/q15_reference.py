"""The specification of ``flash_attention_q15`` in NumPy, in 64 bits and without tiles."""

import math

import numpy as np


def table():
    """round(2^30 2^(-i / 256)): the n with (2 n - 1)^256 <= 2^(31 256 - i) < (2 n + 1)^256."""
    numbers = []
    for i in range(257):
        n = round(2**30 * 2.0 ** (-i / 256))
        assert (2 * n - 1) ** 256 <= 2 ** (31 * 256 - i) < (2 * n + 1) ** 256
        numbers.append(n)
    return np.array(numbers)


def attention(query, key, value, keep=True, scale=None):
    """query (B, T, N, H), key (B, S, K, H), value (B, S, K, Hv), keep to (B, N, T, S)."""
    (N, H), K = query.shape[2:], key.shape[2]
    q, k, v = (np.moveaxis(x.astype(np.int64), 2, 1) for x in (query, key, value))
    k, v = (np.repeat(x, N // K, axis=1) for x in (k, v))
    fraction, e = math.frexp((1 / math.sqrt(H) if scale is None else scale) * 1.4426950408889634)
    M = round(fraction * 2**30)
    x = (q @ k.swapaxes(2, 3) + 128) >> 8
    z = (x * M) >> 30
    bits = 6 - e
    y = z << -bits if bits <= 0 else (z + (1 << (bits - 1))) >> bits  # 0 of many bits
    assert np.abs(y).max() < 2**30
    keep = np.broadcast_to(keep, y.shape)
    m = np.max(np.where(keep, y, -(2**40)), axis=-1, keepdims=True)
    d = np.where(keep, m - y, 2**30)
    n, i, r = d >> 16, (d >> 8) & 255, d & 255
    t = table()
    u = t[i] - (((t[i] - t[i + 1]) * r) >> 8)
    n = np.minimum(n, 24)
    p = np.where(n > 23, 0, (u + (1 << (6 + n))) >> (7 + n))
    total, l = p @ v, p.sum(axis=-1, keepdims=True)
    lost = np.clip(np.vectorize(lambda x: int(x).bit_length() - 31)(l), 0, 8)
    size, l = np.abs(total) >> lost, l >> lost
    out = np.sign(total) * ((2 * size + l) // np.maximum(2 * l, 1))
    return np.moveaxis(np.where(l == 0, 0, out), 1, 2).astype(np.int16)
