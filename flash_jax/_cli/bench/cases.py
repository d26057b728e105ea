"""The cases that are measured: shapes that models have, each with a reason."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """One call: B sequences of T queries and S keys, N query and K key/value heads of size H."""

    name: str
    why: str
    B: int
    T: int
    N: int
    K: int
    H: int
    is_causal: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012  further arguments of flash_attention
    gradient: bool = False  # whether forward and backward are timed together
    keys: int | None = None  # None means as many as queries
    dtype: str = "float32"

    @property
    def S(self) -> int:  # noqa: N802
        """Number of keys."""
        return self.T if self.keys is None else self.keys

    @property
    def plain(self) -> bool:
        """Whether the case has no options, no gradient, and as many key heads as query heads."""
        return not self.options and not self.gradient and self.N == self.K

    @property
    def bound_by_memory(self) -> bool:
        """Whether reading keys and values takes longer than multiplying them."""
        return self.T * (self.N // self.K) < 16

    def kept_pairs(self) -> float:
        """Counts the pairs of query and key that one head keeps, over the whole batch."""
        if "query_segment_ids" in self.options:
            counts = np.unique(self.options["query_segment_ids"], return_counts=True)[1]
            return float(np.sum(counts * (counts + 1) / 2 if self.is_causal else counts**2))
        if "key_value_seq_lengths" in self.options:
            return float(self.T * np.sum(self.options["key_value_seq_lengths"]))
        if "local_window_size" in self.options:
            left, _ = self.options["local_window_size"]
            return self.B * (self.T * (left + 1) - left * (left + 1) / 2)
        return self.B * (self.T * (self.T + 1) / 2 if self.is_causal else self.T * self.S)

    @property
    def flops(self) -> float:
        """Operations of the products over the kept pairs: two products, or seven with gradients."""
        return 2.0 * (7 if self.gradient else 2) * self.N * self.H * self.kept_pairs()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self.B * self.S * self.K * self.H * (2 if self.dtype == "bfloat16" else 4)

    @property
    def shape(self) -> str:
        """The shape as text: [batch x] heads x length x size."""
        heads = str(self.N) if self.N == self.K else f"{self.N}/{self.K}"
        length = str(self.T) if self.keys is None else f"{self.T} of {self.S}"
        batch = "" if self.B == 1 else f"{self.B} x "
        return f"{batch}{heads} x {length} x {self.H}"


def packed(documents: int, length: int) -> dict[str, Any]:
    """Makes the segment ids of equally long documents in one sequence."""
    ids = np.repeat(np.arange(documents, dtype=np.int32), length)[None]
    return {"query_segment_ids": ids, "key_value_segment_ids": ids}


def padded(lengths: list[int]) -> dict[str, Any]:
    """Makes the lengths of a padded batch."""
    filled = np.array(lengths, np.int32)
    return {"query_seq_lengths": filled, "key_value_seq_lengths": filled}


WINDOW = {"local_window_size": (256, 0)}

CASES = {
    case.name: case
    for case in (
        Case("full-2k", "encoder", 1, 2048, 8, 8, 64),
        Case("causal-2k", "prompt of a small decoder", 1, 2048, 8, 8, 64, True),
        Case("full-4k", "encoder of a large model", 1, 4096, 8, 8, 128),
        Case("causal-4k", "prompt of a large decoder", 1, 4096, 8, 8, 128, True),
        Case("gqa-2k", "grouped queries", 1, 2048, 32, 8, 128, True),
        Case("window-8k", "sliding window of 256", 1, 8192, 8, 8, 64, True, WINDOW),
        Case("packed-8k", "four documents in a row", 1, 8192, 8, 8, 64, True, packed(4, 2048)),
        Case("padded-2k", "a batch at 25 % fill", 8, 2048, 8, 8, 64, False, padded([512] * 8)),
        Case("short-512", "short text", 1, 512, 8, 8, 64),
        Case("odd-1009", "a length that no tile divides", 1, 1009, 8, 8, 64),
        Case("batch-128", "sentences", 32, 128, 12, 12, 64),
        Case("batch-384", "passages", 16, 384, 12, 12, 32),
        Case("vision-197", "patches of an image", 16, 197, 12, 12, 64),
        Case("decode-16k", "one token of a large decoder", 1, 1, 32, 8, 128, keys=16384),
        Case("decode-2k", "one token, eight sequences", 8, 1, 16, 16, 64, keys=2048),
        Case("train-2k", "forward and backward", 1, 2048, 8, 8, 64, gradient=True),
        Case("train-causal-2k", "the same, causal", 1, 2048, 8, 8, 64, True, gradient=True),
        Case("train-4k", "the same, large", 1, 4096, 8, 8, 128, gradient=True),
        Case("bf16-4k", "encoder of a large model", 1, 4096, 8, 8, 128, dtype="bfloat16"),
    )
}

# The figure draws a curve of the rate over these lengths.
LENGTHS = (256, 512, 1024, 2048, 4096)


def of_length(T: int) -> Case:
    """Makes a case of the figure's curve."""
    return Case(f"length-{T}", "scaling", 1, T, 8, 8, 64)
