"""Prints how far attention in 8 bits is from float64, by what probabilities are rounded to.

    python tests/benchmarks/accuracy_int8.py

Relative L2 errors of the output, of 2 heads. The tests hold them to bounds: tests/test_int8.py.
"""

import functools

import numpy as np
from jax import numpy as jnp

import flash_jax


def exact_attention(q, k, v):
    """The float64 result."""
    q, k, v = (np.swapaxes(np.asarray(x, np.float64), 1, 2) for x in (q, k, v))
    s = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.swapaxes(p @ v / p.sum(-1, keepdims=True), 1, 2)


def normal(rng, T, S, H, size=1.0, offset=0.0):
    """size times normal queries; keys whose channels are off by offset standard deviations."""
    q, k, v = (rng.standard_normal((1, n, 2, H)).astype(np.float32) for n in (T, S, S))
    return size * q, k + offset * rng.standard_normal(H).astype(np.float32), v


DATA = {
    "normal, 1024 keys, H = 64": (1024, 1024, 64),
    "normal, 1024 keys, H = 128": (1024, 1024, 128),
    "key channels off by 20 sd": (1024, 1024, 64, 1.0, 20.0),
    "normal, 8192 keys, H = 128": (256, 8192, 128),
    "nearly uniform, 8192 keys": (256, 8192, 64, 0.1),
}


def without_smoothing(query, key, value):
    """Keys quantized per row as they are."""
    key = flash_jax.quantize(key, (1, 1, 1, None))
    return flash_jax.flash_attention_int8(query, key, flash_jax.quantize(value, (1, None, 1, 1)))


WAYS = {
    dtype: functools.partial(flash_jax.flash_attention_int8, probability_dtype=dtype)
    for dtype in ("uint8", "bfloat16", "float32")
} | {"uint8, no smoothing": without_smoothing}


def main() -> None:
    rng = np.random.default_rng(0)
    print(f"{'':28}" + "".join(f"{name:>21}" for name in WAYS))
    for name, sizes in DATA.items():
        q, k, v = normal(rng, *sizes)
        exact = exact_attention(q, k, v)
        cells = []
        for way in WAYS.values():
            out = np.asarray(way(*map(jnp.asarray, (q, k, v))), np.float64)
            cells.append(np.linalg.norm(out - exact) / np.linalg.norm(exact))
        print(f"{name:28}" + "".join(f"{100 * x:19.2f} %" for x in cells))


if __name__ == "__main__":
    main()
