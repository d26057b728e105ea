"""Times flash_jax beside what a user would pick instead, in one process, alternating.

    python tests/benchmarks/bench_attention.py                  every case
    python tests/benchmarks/bench_attention.py full-2k train-2k --rounds 21
    python tests/benchmarks/bench_attention.py --ratios         what masks and grouped heads save
    python tests/benchmarks/bench_attention.py --long           1 head x 131072 x 64, causal
    python tests/benchmarks/bench_attention.py --compile        compile time of 32 heads by length

``int8`` is flash_attention_int8, float in and float out. PyTorch, ONNX Runtime and OpenVINO join
where they are installed (extra ``bench``). ``matmul`` is XLA's own float32 product of two matrices
of 2048 x 2048. Ratios are the median over rounds of (other / flash_jax), and (other / int8), within
one round: above 1 flash_jax is faster, and machine noise hits both sides of a round alike.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import peers
from cases import CASES, RATIOS, Case
from jax import numpy as jnp

import flash_jax

CHECKED_ROWS = 64
MATMUL = 2048


class Subject(NamedTuple):
    """One implementation on one case."""

    run: Callable[[], object]  # returns when the result is there
    output: Callable[[], np.ndarray]  # (B, T, N, H) of the forward pass
    compile_seconds: float
    temporary_bytes: int | None


def jax_subject(case: Case, function, q, k, v) -> Subject:
    """function(q, k, v), or with it the gradient of its sum."""
    timed = function
    if case.gradient:
        timed = jax.value_and_grad(lambda *x: jnp.sum(function(*x)), (0, 1, 2))
    start = time.perf_counter()
    compiled = jax.jit(timed).lower(q, k, v).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis().temp_size_in_bytes
    run = lambda: jax.block_until_ready(compiled(q, k, v))  # noqa: E731
    return Subject(run, lambda: np.asarray(jax.jit(function)(q, k, v)), seconds, memory)


def flash_subject(case: Case, q, k, v) -> Subject:
    if not case.kernel:
        options = case.options | {"is_causal": case.is_causal}
        return jax_subject(case, lambda *x: flash_jax.flash_attention(*x, **options), q, k, v)
    auto = flash_jax.FlashAttentionConfig.auto
    config = auto(case.H, case.T, case.T, causal=case.is_causal)
    subject = jax_subject(
        case,
        lambda q, k, v: flash_jax.flash_mha(config, q, k, v),
        *(jnp.swapaxes(x[0], 0, 1) for x in (q, k, v)),
    )
    return subject._replace(output=lambda: np.swapaxes(np.asarray(subject.output()), 0, 1)[None])


def int8_subject(case: Case, q, k, v) -> Subject | None:
    if case.gradient or case.kernel:
        return None
    options = case.options | {"is_causal": case.is_causal}
    int8 = lambda *x: flash_jax.flash_attention_int8(*x, **options)  # noqa: E731
    return jax_subject(case, int8, q, k, v)


def native_subject(case: Case, q, k, v) -> Subject | None:
    if "query_segment_ids" in case.options:
        return None
    options = case.options | {"is_causal": case.is_causal}
    native = lambda *x: jax.nn.dot_product_attention(*x, **options)  # noqa: E731
    return jax_subject(case, native, q, k, v)


def peer_subject(run: peers.Run | None) -> Subject | None:
    return run and Subject(run, lambda: np.swapaxes(run(), 1, 2), 0.0, None)


def subjects_of(case: Case, q, k, v) -> dict[str, Subject]:
    """What runs the case, ``flash_jax`` first; peers in q's dtype, and faster ones beside int8."""
    dtype, arrays = q.dtype.name, [np.asarray(x, np.float32) for x in (q, k, v)]
    openvino = peers.openvino_attention
    subjects = {
        "flash_jax": flash_subject(case, q, k, v),
        "int8": int8_subject(case, q, k, v),
        "jax.nn": native_subject(case, q, k, v),
        "torch": peer_subject(peers.torch_attention(case, *arrays, dtype)),
        "onnxruntime": peer_subject(peers.onnxruntime_attention(case, *arrays)),
        "openvino": peer_subject(openvino(case, *arrays, "f32")),
        "openvino bf16": peer_subject(openvino(case, *arrays, "bf16")),
    }
    return {name: subject for name, subject in subjects.items() if subject is not None}


def inputs(case: Case, dtype, rng):
    heads = (case.N, case.K, case.K)
    return [jnp.asarray(rng.standard_normal((case.B, case.T, n, case.H)), dtype) for n in heads]


def exact_rows(case: Case, rows: np.ndarray, q, k, v) -> np.ndarray:
    """Some rows of the float64 result, (B, rows, N, H)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, case.N // case.K, axis=2) for x in (k, v))
    s = np.einsum("btnh,bsnh->bnts", q[:, rows], k) / np.sqrt(case.H)
    t, keys = rows[:, None], np.arange(case.T)
    keep = (keys <= t) if case.is_causal else np.ones((len(rows), case.T), bool)
    if "local_window_size" in case.options:
        keep = keep & (keys >= t - case.options["local_window_size"][0])
    if "query_segment_ids" in case.options:
        ids = case.options["query_segment_ids"][0]
        keep = keep & (ids[rows][:, None] == ids)
    if "key_value_seq_lengths" in case.options:
        keep = keep & (keys < case.options["key_value_seq_lengths"][0])
    s = np.where(keep, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", p / p.sum(-1, keepdims=True), v)


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
    q, k, v = inputs(case, dtype, rng)
    subjects = subjects_of(case, q, k, v)
    limit = min(case.options.get("query_seq_lengths", [case.T]))
    rows = np.unique(np.linspace(0, limit - 1, CHECKED_ROWS).astype(int))
    exact = exact_rows(case, rows, q, k, v)
    a = jnp.asarray(rng.standard_normal((MATMUL, MATMUL)), jnp.float32)
    matmul = jax.jit(jnp.matmul)
    runs = {name: subject.run for name, subject in subjects.items()}
    seconds = alternate(runs | {"matmul": lambda: matmul(a, a).block_until_ready()}, rounds)
    peak = 2.0 * MATMUL**3 / seconds["matmul"]
    shape = f"B={case.B} T=S={case.T} N={case.N} K={case.K} H={case.H}"
    print(f"\n{case.name}: {case.why}; {shape}, matmul {np.median(peak) / 1e9:.0f} GFLOP/s")
    print(
        f"{'':13} compile s | ms: median [quartiles] | GFLOP/s | of matmul | / flash_jax | "
        "/ int8 | temp MiB | max error"
    )
    for name, subject in subjects.items():
        low, median, high = np.percentile(seconds[name], [25, 50, 75]) * 1e3
        error = np.max(np.abs(subject.output()[:, rows].astype(np.float64) - exact))
        rate, memory = case.flops / seconds[name], subject.temporary_bytes
        against = [
            f"{np.median(seconds[name] / seconds[ours]):.2f}" if ours in seconds else "-"
            for ours in ("flash_jax", "int8")
        ]
        print(
            f"{name:13} {subject.compile_seconds:9.2f} | {median:8.2f} [{low:.2f}, {high:.2f}] | "
            f"{np.median(rate) / 1e9:7.0f} | {np.median(rate / peak):9.2f} | {against[0]:>11} | "
            f"{against[1]:>6} | {'-' if memory is None else f'{memory / 2**20:.1f}':>8} | "
            f"{error:.1e}"
        )


def bench_ratios(dtype, rounds: int, rng) -> None:
    print()
    for name, (numerator, denominator, aim) in RATIOS.items():
        runs = {
            str(i): flash_subject(case, *inputs(case, dtype, rng)).run
            for i, case in enumerate((numerator, denominator))
        }
        seconds = alternate(runs, rounds)
        ratio = np.median(seconds["0"] / seconds["1"])
        times = " / ".join(f"{np.median(x) * 1e3:.1f}" for x in seconds.values())
        print(f"{name:36} {ratio:5.2f}  ({times} ms; wanted {aim})")


def bench_long(rng) -> None:
    T, H = 131072, 64
    config = flash_jax.FlashAttentionConfig.auto(H, T, T, causal=True)
    case = Case("", "", 1, T, 1, 1, H, True)
    q, k, v = (jnp.asarray(rng.standard_normal((T, H)), jnp.float32) for _ in range(3))
    forward = lambda *x: flash_jax.flash_attention_forward(config, *x)  # noqa: E731
    subject = jax_subject(case, forward, q, k, v)
    start = time.perf_counter()
    subject.run()
    seconds = time.perf_counter() - start
    print(
        f"\n1 head x {T} x {H}, causal: {seconds:.1f} s, {case.flops / seconds / 1e9:.0f} GFLOP/s, "
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
    parser.add_argument("--ratios", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    modules = (flash_jax, jax, np, peers.torch, peers.onnxruntime, peers.openvino)
    versions = [f"{m.__name__} {m.__version__}" for m in modules if m]
    print(f"{platform.machine()}, {os.cpu_count()} cores; {', '.join(versions)}")
    print(
        f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}; {arguments.dtype}; {arguments.rounds} rounds"
    )
    rng, dtype = np.random.default_rng(0), jnp.dtype(arguments.dtype)
    if arguments.ratios:
        bench_ratios(dtype, arguments.rounds, rng)
    if arguments.long:
        bench_long(rng)
    if arguments.compile:
        bench_compile()
    if arguments.cases or not (arguments.ratios or arguments.long or arguments.compile):
        for name in arguments.cases or CASES:
            bench(CASES[name], dtype, arguments.rounds, rng)


if __name__ == "__main__":
    main()
