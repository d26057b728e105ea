"""What ``info`` shows: versions, the processor, its vectors, and the tiles chosen for it."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version

import jax

from .._api.config import FlashAttentionConfig
from .._machine.processor import Machine, cores_here, machine, processor
from .._machine.tuned import path, stored
from .._version import __version__

_DEFAULT_VECTOR_WIDTH = 256
_LENGTHS = (512, 2048, 8192, 32768, 131072)
_HEAD_DIMS = (64, 128)

Rows = list[tuple[str, str]]


def versions() -> Rows:
    """Lists the versions of this package and of what it builds on."""
    others = [(name, version(name)) for name in ("jax", "jaxlib", "numpy")]
    return [("flash_jax", __version__), *others, ("Python", platform.python_version())]


def hardware() -> Rows:
    """Lists what the choice of tiles knows of the processor."""
    return [
        ("processor", processor()),
        *caches(machine()),
        ("vector width", vector_width(os.environ.get("XLA_FLAGS", ""))),
        ("tuned tiles", f"{len(stored())} in {path()}"),
    ]


def caches(found: Machine) -> Rows:
    """Lists cores and cache sizes, and whether they were read or assumed."""
    source = "" if found.measured else " (assumed: this system does not tell)"
    return [
        ("cores", str(found.cores)),
        ("L1 data cache, per core", _kib(found.l1) + source),
        ("L2 cache, per core", _kib(found.l2) + source),
        ("L3 cache", (_kib(found.l3) if found.l3 else "none") + source),
    ]


def devices_of_jax() -> Rows:
    """Lists the CPU devices that JAX makes here, which it makes now."""
    return [("CPU devices", devices(cores_here(), len(jax.local_devices(backend="cpu"))))]


def devices(cores: int, count: int) -> str:
    """Says how many CPU devices JAX makes, and how there would be one per core.

    Example:
        >>> devices(16, 1)
        '1 for 16 cores: flash_jax.core_mesh() makes one per core'
    """
    one_each = (
        "" if count >= cores else f" for {cores} cores: flash_jax.core_mesh() makes one per core"
    )
    return f"{count}{one_each}"


def _kib(count: int) -> str:
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count / 2**10:g} KiB"


def vector_width(xla_flags: str) -> str:
    """Names the width of vectors that XLA prefers, and who set it.

    Example:
        >>> vector_width("--xla_cpu_prefer_vector_width=512")
        '512 bits (XLA_FLAGS)'
    """
    found = re.findall(r"(?:^|\s)--?xla_cpu_prefer_vector_width=(\d+)", xla_flags)
    if found:
        return f"{found[-1]} bits (XLA_FLAGS)"  # the last one counts
    return f"{_DEFAULT_VECTOR_WIDTH} bits (XLA's default)"


VECTOR_HINT = (
    "XLA_FLAGS=--xla_cpu_prefer_vector_width=512 in the environment lets XLA use 512-bit vectors:\n"
    "on processors with AVX-512 it may be a few percent faster, or no faster: measure."
)


def tile_header() -> tuple[str, ...]:
    """Names the columns of ``tiles``."""
    kinds = [f"H = {H}{causal}" for H in _HEAD_DIMS for causal in ("", ", causal")]
    return ("T = S", *kinds)


def tiles() -> list[tuple[str, ...]]:
    """Lists what ``FlashAttentionConfig.auto`` picks for common shapes: queries x keys per tile."""
    return [
        (f"{T:,}", *(_tile(H, T, causal) for H in _HEAD_DIMS for causal in (False, True)))
        for T in _LENGTHS
    ]


def _tile(head_dim: int, length: int, causal: bool) -> str:
    blocks = FlashAttentionConfig.auto(head_dim, length, length, causal=causal).block_sizes
    return f"{blocks.q} x {blocks.kv}"
