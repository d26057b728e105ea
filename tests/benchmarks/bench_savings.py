"""What masks and grouped heads save, how far one head reaches, and what compiling takes.

    python tests/benchmarks/bench_savings.py

Speed beside other libraries is measured by ``python -m flash_jax bench``.
"""

import argparse
import time

import jax
import numpy as np
from jax import numpy as jnp

import flash_jax
from flash_jax._cli.bench.cases import CASES, Case
from flash_jax._cli.bench.exact import random_inputs
from flash_jax._cli.bench.jax_subjects import ours
from flash_jax._cli.bench.report import environment
from flash_jax._machine.timing import alternate

# name: (one case, another, what the ratio of their times should be at the most or least)
RATIOS = {
    "full / causal, 4096": (
        Case("", "", 1, 4096, 8, 8, 64),
        Case("", "", 1, 4096, 8, 8, 64, True),
        ">= 1.6",
    ),
    "causal / window 256, 8192": (
        Case("", "", 1, 8192, 8, 8, 64, True),
        CASES["window-8k"],
        ">= 4",
    ),
    "window 256, 16384 / 8192": (
        Case("", "", 1, 16384, 8, 8, 64, True, window=256),
        CASES["window-8k"],
        "about 2",
    ),
    "4 packed documents / causal, 8192": (
        CASES["packed-8k"],
        Case("", "", 1, 8192, 8, 8, 64, True),
        "<= 0.40",
    ),
    "batch at 25 % fill / full batch": (
        CASES["padded-2k"],
        Case("", "", 8, 2048, 8, 8, 64),
        "<= 0.45",
    ),
    "25 % of blocks / all, 8192": (
        CASES["sparse-8k"],
        Case("", "", 1, 8192, 8, 8, 64),
        "<= 0.35",
    ),
    "25 % of blocks / all, 8192, training": (
        CASES["train-sparse-8k"],
        Case("", "", 1, 8192, 8, 8, 64, gradient=True),
        "<= 0.40",
    ),
    "10 % of blocks / all, 32768": (
        Case("", "", 1, 32768, 8, 8, 64, density=0.1),
        Case("", "", 1, 32768, 8, 8, 64),
        "<= 0.15",
    ),
    "GQA 32/8 / 32/32 heads": (
        CASES["gqa-2k"],
        Case("", "", 1, 2048, 32, 32, 128, True),
        "<= 1.0",
    ),
}


def bench_ratios(rounds: int) -> None:
    for name, (numerator, denominator, aim) in RATIOS.items():
        runs = {}
        for key, case in (("above", numerator), ("below", denominator)):
            runs[key] = ours(case, random_inputs(case)).run
        seconds = alternate(runs, rounds)
        ratio = np.median(seconds["above"] / seconds["below"])
        times = " / ".join(f"{np.median(x) * 1e3:.1f}" for x in seconds.values())
        print(f"{name:36} {ratio:5.2f}  ({times} ms; wanted {aim})")


def bench_long() -> None:
    case = Case("", "", 1, 131072, 1, 1, 64, True)
    subject = ours(case, random_inputs(case))
    assert subject.temporary_bytes is not None
    subject.run()
    start = time.perf_counter()
    subject.run()
    seconds = time.perf_counter() - start
    print(
        f"\n{case.shape}, causal: {seconds:.1f} s, {case.flops / seconds / 1e9:.0f} GFLOP/s, "
        f"{subject.temporary_bytes / 2**20:.1f} MiB of temporaries; scores {case.T**2 >> 28} GiB"
    )


def bench_compile() -> None:
    for T in (512, 4096, 32768, 262144):
        config = flash_jax.FlashAttentionConfig.auto(64, T, T, causal=True)
        x = jax.ShapeDtypeStruct((32, T, 64), jnp.float32)
        start = time.perf_counter()
        jax.jit(flash_jax.flash_mha, static_argnums=0).lower(config, x, x, x).compile()
        seconds = time.perf_counter() - start
        print(f"32 x {T} x 64, causal: traced and compiled in {seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print("; ".join(f"{name} {value}" for name, value in environment({}).items()))
    bench_ratios(rounds)
    bench_long()
    bench_compile()


if __name__ == "__main__":
    main()
