"""What choosing blocks costs beside attention, and fixed point beside floats.

    python tests/benchmarks/costs.py [--rounds N]

Elapsed seconds, the median ratio of alternating rounds.
"""

import argparse
import functools

import jax
import numpy as np
from jax import numpy as jnp

from flash_jax import choose_blocks, flash_attention, flash_attention_q15, to_q15
from flash_jax._machine.timing import alternate


def run(function, *arrays):
    return lambda: jax.block_until_ready(function(*arrays))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds, rng = parser.parse_args().rounds, np.random.default_rng(0)
    attend = functools.partial(flash_attention, is_causal=True)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 8192, 8, 64)), np.float32) for _ in range(3))
    choices = {
        name: functools.partial(
            choose_blocks, method=name, density=0.2, block_sizes=sizes, is_causal=True
        )
        for name, sizes in {
            "mincut": (64, 64),
            "pooled": (128, 128),
            "antidiagonal": (128, 128),
        }.items()
    }
    calls = {name: run(choose, q, k) for name, choose in choices.items()}
    shown("causal attention, 8 x 8192 x 64", run(attend, q, k, v), calls, rounds)
    x = [jnp.asarray(rng.standard_normal((1, 4096, 4, 64)), np.float32) for _ in range(3)]
    integers = {"flash_attention_q15": run(flash_attention_q15, *(to_q15(y / 8) for y in x))}
    shown("attention, 4 x 4096 x 64", run(flash_attention, *x), integers, rounds)


def shown(name, reference, calls, rounds):
    seconds = alternate({name: reference} | calls, rounds)
    for other, found in seconds.items():
        ratio = np.median(found / seconds[name])
        print(f"{other:36} {1e3 * np.median(found):9.1f} ms {ratio:8.3f}")


if __name__ == "__main__":
    main()
