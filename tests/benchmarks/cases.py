"""What is measured: shapes that models meet, each with the reason it stands here."""

from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    name: str
    why: str
    B: int
    T: int
    N: int
    K: int
    H: int
    is_causal: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012  further arguments of flash_attention
    gradient: bool = False  # forward and backward
    kernel: bool = False  # flash_mha with heads first, as its users hold them

    def kept_pairs(self) -> float:
        """Pairs of query and key of one head, over the batch."""
        T = self.T
        if "query_segment_ids" in self.options:
            counts = np.unique(self.options["query_segment_ids"], return_counts=True)[1]
            return float(np.sum(counts * (counts + 1) / 2 if self.is_causal else counts**2))
        if "key_value_seq_lengths" in self.options:
            return float(T * np.sum(self.options["key_value_seq_lengths"]))
        if "local_window_size" in self.options:
            left, _ = self.options["local_window_size"]
            return self.B * (T * (left + 1) - left * (left + 1) / 2)
        return self.B * (T * (T + 1) / 2 if self.is_causal else T * T)

    @property
    def flops(self) -> float:
        """Of the matrix products over the kept pairs: two forward, five more backward."""
        return 2.0 * (7 if self.gradient else 2) * self.N * self.H * self.kept_pairs()


def packed(documents: int, length: int) -> dict[str, Any]:
    ids = np.repeat(np.arange(documents, dtype=np.int32), length)[None]
    return {"query_segment_ids": ids, "key_value_segment_ids": ids}


def padded(lengths: list[int]) -> dict[str, Any]:
    filled = np.array(lengths, np.int32)
    return {"query_seq_lengths": filled, "key_value_seq_lengths": filled}


CASES = {
    case.name: case
    for case in (
        Case("kernel-2k", "flash_mha, heads first", 1, 2048, 8, 8, 64, kernel=True),
        Case("kernel-causal-2k", "the same, causal", 1, 2048, 8, 8, 64, True, kernel=True),
        Case("full-2k", "encoder", 1, 2048, 8, 8, 64),
        Case("causal-2k", "prompt of a small decoder", 1, 2048, 8, 8, 64, True),
        Case("full-4k", "encoder of a large model", 1, 4096, 8, 8, 128),
        Case("causal-4k", "prompt of a large decoder", 1, 4096, 8, 8, 128, True),
        Case("gqa-2k", "grouped queries", 1, 2048, 32, 8, 128, True),
        Case("short-512", "short text", 1, 512, 8, 8, 64),
        Case("odd-1009", "a length that no tile divides", 1, 1009, 8, 8, 64),
        Case(
            "window-8k",
            "sliding window of 256",
            1,
            8192,
            8,
            8,
            64,
            True,
            {"local_window_size": (256, 0)},
        ),
        Case("packed-8k", "four documents in a row", 1, 8192, 8, 8, 64, True, packed(4, 2048)),
        Case("padded-2k", "a batch at 25 % fill", 8, 2048, 8, 8, 64, False, padded([512] * 8)),
        Case("train-2k", "forward and backward", 1, 2048, 8, 8, 64, gradient=True),
        Case("train-causal-2k", "the same, causal", 1, 2048, 8, 8, 64, True, gradient=True),
        Case("train-4k", "the same, large", 1, 4096, 8, 8, 128, gradient=True),
    )
}

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
        Case("", "", 1, 16384, 8, 8, 64, True, {"local_window_size": (256, 0)}),
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
    "GQA 32/8 / 32/32 heads": (
        CASES["gqa-2k"],
        Case("", "", 1, 2048, 32, 32, 128, True),
        "<= 1.0",
    ),
}
