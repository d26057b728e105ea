"""The cases that are measured: shapes that models have, each with a reason."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

DTYPES = ("float32", "bfloat16")
BLOCK = 128  # positions of a block of a sparse case, queries and keys


class Case(NamedTuple):
    """One call: B sequences of T queries and S keys, N query and K key/value heads of size H.

    Every field is plain, so that a case goes to another process as JSON.
    """

    name: str
    why: str
    B: int
    T: int
    N: int
    K: int
    H: int
    is_causal: bool = False
    window: int | None = None  # how many keys before its own a query reads
    documents: int = 1  # equally long, packed into each sequence
    filled: tuple[int, ...] | None = None  # (B,): positions that are no padding
    gradient: bool = False  # whether forward and backward are timed together
    keys: int | None = None  # None means as many as queries
    dtype: str = "float32"
    devices: int = 1  # that libraries of JAX divide the work over
    density: float | None = None  # the share of its blocks that each row of blocks keeps, at random

    @property
    def S(self) -> int:  # noqa: N802
        """Number of keys."""
        return self.T if self.keys is None else self.keys

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of flash_attention."""
        options: dict[str, Any] = {}
        if self.window is not None:
            options["local_window_size"] = (self.window, 0)
        if self.documents > 1:
            ids = np.repeat(np.arange(self.documents, dtype=np.int32), self.T // self.documents)
            ids = np.tile(ids, (self.B, 1))
            options |= {"query_segment_ids": ids, "key_value_segment_ids": ids}
        if self.filled is not None:
            lengths = np.array(self.filled, np.int32)
            options |= {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        if self.density is not None:
            from flash_jax import BlockSparseMask  # a peer's process may have no JAX

            options["mask"] = BlockSparseMask(self.table, (BLOCK, BLOCK))
        return options

    @property
    def table(self) -> np.ndarray:
        """Which blocks are kept, (N, T / block, S / block): equally many in every row."""
        assert self.density is not None
        rows, columns = self.T // BLOCK, self.S // BLOCK
        order = np.random.default_rng(1).random((self.N, rows, columns)).argsort(axis=-1)
        return order < round(self.density * columns)

    @property
    def bound_by_memory(self) -> bool:
        """Whether reading keys and values takes longer than multiplying them."""
        return self.T * (self.N // self.K) < 16

    def kept_pairs(self) -> float:
        """Counts the pairs of query and key that one head keeps, over the whole batch."""
        if self.filled is not None:
            return float(self.T * np.sum(self.filled))
        if self.window is not None:
            return self.B * (self.T * (self.window + 1) - self.window * (self.window + 1) / 2)
        if self.density is not None:
            return self.B * float(np.sum(self.table)) * BLOCK**2 / self.N
        length, keys = self.T // self.documents, self.S // self.documents
        one = length * (length + 1) / 2 if self.is_causal else length * keys
        return float(self.B * self.documents * one)

    @property
    def flops(self) -> float:
        """Operations of the products over the kept pairs: two products, or seven with gradients."""
        return 2.0 * (7 if self.gradient else 2) * self.N * self.H * self.kept_pairs()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self.B * self.S * self.K * self.H * (2 if self.dtype == "bfloat16" else 4)

    @property
    def divided(self) -> tuple[int, int, int] | None:
        """Parts of the batch, heads and queries, one for each device; None: they do not divide."""
        batch = math.gcd(self.B, self.devices)
        heads = math.gcd(self.K, self.devices // batch)
        queries = self.devices // batch // heads
        return None if self.T % queries else (batch, heads, queries)

    @property
    def shape(self) -> str:
        """The shape as text: [batch x] heads x length x size."""
        heads = str(self.N) if self.N == self.K else f"{self.N}/{self.K}"
        length = str(self.T) if self.keys is None else f"{self.T} of {self.S}"
        batch = "" if self.B == 1 else f"{self.B} x "
        return f"{batch}{heads} x {length} x {self.H}"


CASES = {
    case.name: case
    for case in (
        Case("full-2k", "encoder", 1, 2048, 8, 8, 64),
        Case("causal-2k", "prompt of a small decoder", 1, 2048, 8, 8, 64, True),
        Case("full-4k", "encoder of a large model", 1, 4096, 8, 8, 128),
        Case("causal-4k", "prompt of a large decoder", 1, 4096, 8, 8, 128, True),
        Case("gqa-2k", "grouped queries", 1, 2048, 32, 8, 128, True),
        Case("window-8k", "sliding window of 256", 1, 8192, 8, 8, 64, True, window=256),
        Case("packed-8k", "four documents in a row", 1, 8192, 8, 8, 64, True, documents=4),
        Case("sparse-8k", "a quarter of the blocks of 128", 1, 8192, 8, 8, 64, density=0.25),
        Case("padded-2k", "a batch at 25 % fill", 8, 2048, 8, 8, 64, filled=(512,) * 8),
        Case("short-512", "short text", 1, 512, 8, 8, 64),
        Case("odd-1009", "a length that no tile divides", 1, 1009, 8, 8, 64),
        Case("batch-128", "sentences", 32, 128, 12, 12, 64),
        Case("batch-384", "passages", 16, 384, 12, 12, 32),
        Case("vision-197", "patches of an image", 16, 197, 12, 12, 64),
        Case("decode-16k", "one token of a large decoder", 1, 1, 32, 8, 128, keys=16384),
        Case("decode-2k", "one token, eight sequences", 8, 1, 16, 16, 64, keys=2048),
        Case("decode-4k", "one token of a large decoder, a batch", 8, 1, 32, 8, 128, keys=4096),
        Case("speculate-16k", "eight tokens at once", 1, 8, 32, 8, 128, keys=16384),
        Case("train-2k", "forward and backward", 1, 2048, 8, 8, 64, gradient=True),
        Case("train-causal-2k", "the same, causal", 1, 2048, 8, 8, 64, True, gradient=True),
        Case(
            "train-sparse-8k",
            "the same, a quarter of the blocks",
            *(1, 8192, 8, 8, 64),
            gradient=True,
            density=0.25,
        ),
        Case("train-4k", "the same, large", 1, 4096, 8, 8, 128, gradient=True),
        Case("train-384", "the same, passages", 16, 384, 12, 12, 32, gradient=True),
        Case("train-128", "the same, sentences", 32, 128, 12, 12, 64, gradient=True),
    )
}

# The figure draws a curve of the rate over these lengths.
LENGTHS = (256, 512, 1024, 2048, 4096)


def of_length(T: int) -> Case:
    """Makes a case of the figure's curve."""
    return Case(f"length-{T}", "scaling", 1, T, 8, 8, 64)


def twin(case: Case) -> Case:
    """Makes the same case on bfloat16."""
    return case._replace(name=f"{case.name}-bf16", dtype="bfloat16")


def over_devices(case: Case, count: int) -> Case:
    """Makes the same case with its work divided over devices, or returns one that does not divide.

    Example:
        >>> over_devices(CASES["full-2k"], 16).divided
        (1, 8, 2)
    """
    divided = case._replace(devices=count)
    return case if divided.divided is None else divided


def in_dtypes(case: Case, choice: str) -> list[Case]:
    """Lists a case in the dtypes of a choice: "float32", "bfloat16" or "both"."""
    twins = {"float32": case, "bfloat16": twin(case)}
    return [twins[dtype] for dtype in DTYPES if choice in (dtype, "both")]
