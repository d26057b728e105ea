"""The fastest tiles for given shapes, found by measuring, and kept for later calls."""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from .._checks.bind import Sizes
from .._checks.numbers import check_bool, check_probability_dtype, positive_integer
from .._formats.quantized import QuantizedArray
from .._machine.processor import machine
from .._machine.tile_rule import Problem, fastest_blocks, kernel_blocks, score_bytes
from .._machine.timing import alternate
from .._machine.tuned import store
from .._tiles.axis import BlockSizes
from .attention import flash_attention
from .attention_int8 import flash_attention_int8
from .options import Arrays, check_options, one_mask

_LENGTHS = (128, 256, 512, 1024, 2048)
_FINALISTS = 4
_WORTHWHILE = 1.02  # times faster than the rule's tiles; less is noise


def tune(
    query: ArrayLike,
    key: ArrayLike | QuantizedArray,
    value: ArrayLike | QuantizedArray,
    *,
    int8: bool = False,
    rounds: int = 7,
    **options: Any,
) -> BlockSizes:
    """Measures tile sizes on this machine, and keeps the fastest for later calls.

    From then on ``flash_attention`` or ``flash_attention_int8`` uses them, in other processes, too,
    and so does ``FlashAttentionConfig.auto`` where K = N. The choice holds for calls that agree in
    T, S, H, N // K, dtype, ``local_window_size``, and in whether they have a mask of any kind and a
    ``score_mod``.
    Functions that ``jit`` compiled before keep their tiles. A ``block_sizes`` given in a call
    always wins.

    The choice is kept in the folder ``flash_jax`` of the user's caches (``XDG_CACHE_HOME``), for
    this version of flash_jax and jaxlib and this processor. ``python -m flash_jax info`` tells
    where. Progress goes to the standard error stream. A call takes some seconds, most of it for
    compilation.

    Args:
        query: (B, T, N, H), as ``flash_attention`` takes it; the values do not matter.
        key: (B, S, K, H).
        value: (B, S, K, Hv).
        int8: tune ``flash_attention_int8``.
        rounds: how often the fastest candidates are measured, in turn.
        options: further arguments of the function that is tuned.

    Returns:
        The tiles that later calls use.

    Raises:
        TypeError: it is called under ``jit`` or another transformation, or an argument is of the
            wrong kind.
        ValueError: as ``flash_attention``.

    Warns:
        UserWarning: the choice can't be written, so it lasts for this process only.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 32, 2, 8))
        >>> tune(x, x, x, is_causal=True, rounds=1).q <= 32
        True
    """
    if "block_sizes" in options:
        raise TypeError("block_sizes must not be given: it is what tune finds")
    for name, x in {"query": query, "key": key, "value": value, **options}.items():
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x)):
            raise TypeError(f"{name} must be concrete: tune can't measure under a transformation")
    rounds, int8 = positive_integer("rounds", rounds), check_bool("int8", int8)
    function = flash_attention_int8 if int8 else flash_attention
    call = functools.partial(function, query, key, value, **options)
    jax.eval_shape(call)  # its errors come first
    problem = _problem(query, key, int8, options)
    rule, *others = _candidates(problem)
    seconds = _measure(call, [rule, *others], 1)
    finalists = sorted(seconds, key=lambda blocks: np.median(seconds[blocks]))[:_FINALISTS]
    seconds = _measure(call, list(dict.fromkeys([rule, *finalists])), rounds)
    gain = {blocks: np.median(seconds[rule] / x) for blocks, x in seconds.items()}
    best = max(gain, key=lambda blocks: gain[blocks])
    best = best if gain[best] >= _WORTHWHILE else rule
    _say(f"{best.q} x {best.kv}, {gain[best]:.2f} times as fast as {rule.q} x {rule.kv}\n")
    store(problem, best)
    return best


def _problem(query: Any, key: Any, int8: bool, given: dict[str, Any]) -> Problem:
    """What the choice of tiles for the call depends on."""
    probabilities = None
    if int8:
        dtype = given.get("probability_dtype", np.uint8)
        probabilities = check_probability_dtype("probability_dtype", dtype)
    options = check_options(
        query, given.get("is_causal", False), given.get("local_window_size"), None
    )._replace(probabilities=probabilities)
    scored = given.get("score_mod") is not None
    names = (name for name in Arrays._fields if name in given and name != "score_mod")
    arrays = Arrays(**{name: given[name] for name in names}).checked()
    mask = jax.eval_shape(lambda: one_mask(arrays.bound(Sizes(), np.dtype(np.float32)), options))
    return options.problem(query, key, masked=mask is not None, scored=scored)


def _candidates(problem: Problem) -> list[BlockSizes]:
    """The rules' tiles, then others. A step can hold the scores of one key/value head."""
    here = machine()
    rules = [rule(here, problem) for rule in (kernel_blocks, fastest_blocks)]
    most = 2 * score_bytes(here) // (4 * problem.groups)
    pairs = (
        BlockSizes(min(q, problem.T), min(kv, problem.S))
        for q in (*_LENGTHS, problem.T)
        for kv in (*_LENGTHS, problem.S)
    )
    pairs = (x for x in pairs if 0 < x.q * x.kv <= most)
    return list(dict.fromkeys([*rules[not here.one_kernel :], *pairs]))


def _measure(call: Any, candidates: list[BlockSizes], rounds: int) -> dict[BlockSizes, np.ndarray]:
    """Seconds of every candidate in alternating rounds."""

    def run(blocks: BlockSizes) -> Array:
        return jax.block_until_ready(call(block_sizes=blocks))

    for i, blocks in enumerate(candidates, 1):
        _say(f"{blocks.q} x {blocks.kv} ({i} of {len(candidates)})")
        run(blocks)
    _say(f"{rounds} rounds of {len(candidates)}")
    return alternate({blocks: functools.partial(run, blocks) for blocks in candidates}, rounds)


def _say(text: str) -> None:
    print(f"\r\x1b[Kflash_jax.tune: {text}", end="", file=sys.stderr, flush=True)
