"""What a function of scores costs, beside the call without one and PyTorch's FlexAttention.

    python tests/benchmarks/score_mod.py [--torch] [--rounds N] [SIZE ...]      SIZE: HEADSxTxH

CPU seconds of the process (user and system), the median of alternating rounds, in float32.
``--torch`` runs FlexAttention by ``torch.compile`` instead, in an environment that has PyTorch and
a C++ compiler, and not JAX: its numbers are compared with those of another run of this script.
"""

import argparse
import math
import resource
import statistics


def cpu_seconds():
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def of_flash_jax(heads, T, H):
    import jax
    import numpy as np
    from jax import numpy as jnp

    from flash_jax import flash_attention

    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.standard_normal((1, T, heads, H)), np.float32) for _ in range(3)]
    table = jnp.asarray(rng.standard_normal((heads, 2 * T)), np.float32)
    causal = lambda s, b, h, q, k: jnp.where(q >= k, s, -jnp.inf)  # noqa: E731
    calls = {
        "plain": {},
        "one add": {"score_mod": lambda s, b, h, q, k: s + 0.5},
        "by position": {"score_mod": lambda s, b, h, q, k: s + 0.01 * (q - k)},
        "table": {"score_mod": lambda s, b, h, q, k: s + table[h, q - k + T]},
        "soft cap": {"score_mod": lambda s, b, h, q, k: 20 * jnp.tanh(s / 20)},
        "causal": {"score_mod": causal},
        "is_causal": {"is_causal": True},
    }

    def forward(name):
        f = jax.jit(lambda *x: flash_attention(*x, **calls[name]))
        return lambda: f(*inputs).block_until_ready()

    def backward(name):
        f = jax.jit(jax.grad(lambda x: flash_attention(*x, **calls[name]).sum()))
        return lambda: jax.block_until_ready(f(inputs))

    found = {f"{name}, forward": forward(name) for name in calls}
    of_both = "plain", "one add", "by position", "table"
    return found | {f"{name}, forward and backward": backward(name) for name in of_both}


def of_torch(heads, T, H):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, T, H) for _ in range(3)]
    table = torch.randn(heads, 2 * T)
    block = create_block_mask(
        lambda b, h, q, k: q >= k, None, None, T, T, device="cpu", BLOCK_SIZE=128
    )
    calls = {
        "plain": {},
        "one add": {"score_mod": lambda s, b, h, q, k: s + 0.5},
        "by position": {"score_mod": lambda s, b, h, q, k: s + 0.01 * (q - k)},
        "table": {"score_mod": lambda s, b, h, q, k: s + table[h, q - k + T]},
        "soft cap": {"score_mod": lambda s, b, h, q, k: 20 * torch.tanh(s / 20)},
        "causal": {"score_mod": lambda s, b, h, q, k: torch.where(q >= k, s, -math.inf)},
        "is_causal": {"block_mask": block},
    }

    def forward(given):
        f = torch.compile(lambda *x: flex_attention(*x, **given))

        def run():
            with torch.no_grad():
                return f(*inputs)

        return run

    return {f"{name}, forward": forward(given) for name, given in calls.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("sizes", nargs="*", default=["8x2048x64", "8x4096x128"])
    given = parser.parse_args()
    for size in given.sizes:
        calls = (of_torch if given.torch else of_flash_jax)(*map(int, size.split("x")))
        for call in calls.values():
            call()
        seconds = {name: [] for name in calls}
        for _ in range(given.rounds):
            for name, call in calls.items():
                start = cpu_seconds()
                call()
                seconds[name].append(cpu_seconds() - start)
        for name, found in seconds.items():
            plain = statistics.median(seconds[f"plain, {name.split(', ')[1]}"])
            print(
                f"{size:>12} {name:35} {statistics.median(found) * 1e3:8.1f} ms"
                f" (least {min(found) * 1e3:.1f}), {statistics.median(found) / plain:.2f} of plain"
            )


if __name__ == "__main__":
    main()
