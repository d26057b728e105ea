"""Times flash_jax beside what a user would pick instead, in one process, alternating.

    python tests/benchmarks/bench_attention.py                 every case
    python tests/benchmarks/bench_attention.py full-2k --rounds 21
    python tests/benchmarks/bench_attention.py --long          1 head x 131072 x 64, causal
    python tests/benchmarks/bench_attention.py --compile       compile time of 32 heads by length

PyTorch joins where it is installed (extra ``bench``). ``matmul`` is XLA's own float32 product of
two 2048 x 2048 matrices. Ratios are the median over rounds of (other / flash_jax) within one
round: above 1 flash_jax is faster, and machine noise hits both sides of a round alike.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from cases import CASES, Case
from jax import numpy as jnp

import flash_jax

try:
    import torch
except ImportError:
    torch = None

CHECKED_ROWS = 64
MATMUL = 2048


class Subject(NamedTuple):
    """One implementation on one case."""

    run: Callable[[], object]  # returns when the result is there
    output: Callable[[], np.ndarray]  # (B, N, T, Hv)
    compile_seconds: float
    temporary_bytes: int | None


def jax_subject(function, *arguments) -> Subject:
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis().temp_size_in_bytes
    run = lambda: jax.block_until_ready(compiled(*arguments))  # noqa: E731
    return Subject(run, lambda: np.asarray(run()), seconds, memory)


def heads_first(x):
    return jnp.swapaxes(x, 1, 2)


def subjects_of(case: Case, dtype, rng) -> tuple[dict[str, Subject], tuple[np.ndarray, ...]]:
    shapes = [
        (case.B, n, t, case.H) for n, t in ((case.N, case.T), (case.K, case.S), (case.K, case.S))
    ]
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    config = flash_jax.FlashAttentionConfig.auto(case.H, case.T, case.S, causal=case.is_causal)
    subjects = {
        "flash_jax": jax_subject(
            jax.vmap(lambda q, k, v: flash_jax.flash_mha(config, q, k, v)), q, k, v
        )
    }
    nn = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=case.is_causal)  # noqa: E731
    native = jax_subject(nn, *map(heads_first, (q, k, v)))
    subjects["jax.nn"] = native._replace(output=lambda: np.asarray(heads_first(native.run())))
    if torch is not None:
        tensors = [torch.tensor(np.asarray(x, np.float32)) for x in (q, k, v)]
        tensors = [x.to(getattr(torch, jnp.dtype(dtype).name)) for x in tensors]
        run = lambda: torch.nn.functional.scaled_dot_product_attention(  # noqa: E731
            *tensors, is_causal=case.is_causal, enable_gqa=case.N != case.K
        )
        subjects["torch"] = Subject(run, lambda: run().float().numpy(), 0.0, None)
    return subjects, tuple(np.asarray(x, np.float64) for x in (q, k, v))


def exact_rows(case: Case, rows: np.ndarray, q, k, v) -> np.ndarray:
    """Some rows of the float64 result, (B, N, rows, H)."""
    k, v = (np.repeat(x, case.N // case.K, axis=1) for x in (k, v))
    s = np.einsum("bnth,bnsh->bnts", q[:, :, rows], k) / np.sqrt(case.H)
    if case.is_causal:
        s = np.where(np.arange(case.S) <= rows[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bnts,bnsh->bnth", p / p.sum(-1, keepdims=True), v)


def alternate(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every run in every round, after two warm-ups."""
    for run in runs.values():
        run(), run()
    seconds = {name: np.empty(rounds) for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name][i] = time.perf_counter() - start
    return seconds


def bench(case: Case, dtype, rounds: int, rng) -> None:
    subjects, exact_inputs = subjects_of(case, dtype, rng)
    rows = np.unique(np.linspace(0, case.T - 1, CHECKED_ROWS).astype(int))
    exact = exact_rows(case, rows, *exact_inputs)
    a = jnp.asarray(rng.standard_normal((MATMUL, MATMUL)), jnp.float32)
    matmul = jax.jit(jnp.matmul)
    runs = {name: subject.run for name, subject in subjects.items()}
    seconds = alternate(runs | {"matmul": lambda: matmul(a, a).block_until_ready()}, rounds)
    peak = 2.0 * MATMUL**3 / seconds["matmul"]
    print(f"\n{case.name}: {case.why}; {case}")
    print(
        f"{'':10} compile s | ms: median [quartiles] | GFLOP/s | of matmul | ratio | temp MiB | "
        "max error"
    )
    for name, subject in subjects.items():
        low, median, high = np.percentile(seconds[name], [25, 50, 75]) * 1e3
        error = np.max(np.abs(subject.output()[:, :, rows].astype(np.float64) - exact))
        rate = case.flops / seconds[name]
        memory = subject.temporary_bytes
        print(
            f"{name:10} {subject.compile_seconds:9.2f} | {median:8.2f} [{low:.2f}, {high:.2f}] | "
            f"{np.median(rate) / 1e9:7.0f} | {np.median(rate / peak):9.2f} | "
            f"{np.median(seconds[name] / seconds['flash_jax']):5.2f} | "
            f"{'-' if memory is None else f'{memory / 2**20:.1f}':>8} | {error:.1e}"
        )


def bench_long(rng) -> None:
    T, H = 131072, 64
    config = flash_jax.FlashAttentionConfig.auto(H, T, T, causal=True)
    q, k, v = (jnp.asarray(rng.standard_normal((T, H)), jnp.float32) for _ in range(3))
    f = lambda q, k, v: flash_jax.flash_attention_forward(config, q, k, v)  # noqa: E731
    subject = jax_subject(f, q, k, v)
    start = time.perf_counter()
    subject.run()
    seconds = time.perf_counter() - start
    print(
        f"\n1 head x {T} x {H}, causal: {seconds:.1f} s, "
        f"{2 * T * T * H / seconds / 1e9:.0f} GFLOP/s, "
        f"{subject.temporary_bytes / 2**20:.1f} MiB of temporaries; scores {T * T >> 28} GiB"
    )


def bench_compile() -> None:
    for T in (512, 4096, 32768, 262144):
        config = flash_jax.FlashAttentionConfig.auto(64, T, T, causal=True)
        x = jax.ShapeDtypeStruct((32, T, 64), jnp.float32)
        start = time.perf_counter()
        jax.jit(flash_jax.flash_mha, static_argnums=0).lower(config, x, x, x).compile()
        seconds = time.perf_counter() - start
        print(f"32 heads x {T} x 64, causal: traced and compiled in {seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[], help=f"of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    versions = [f"{m.__name__} {m.__version__}" for m in (flash_jax, jax, np, torch) if m]
    print(f"{platform.machine()}, {os.cpu_count()} cores; {', '.join(versions)}")
    print(
        f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}; {arguments.dtype}; {arguments.rounds} rounds"
    )
    rng = np.random.default_rng(0)
    if arguments.long:
        bench_long(rng)
    if arguments.compile:
        bench_compile()
    if arguments.cases or not (arguments.long or arguments.compile):
        for name in arguments.cases or CASES:
            bench(CASES[name], jnp.dtype(arguments.dtype), arguments.rounds, rng)


if __name__ == "__main__":
    main()
