"""What is measured: shapes that models meet, each with the reason it stands here."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    is_causal: bool
    why: str

    @property
    def flops(self) -> float:
        """Of the two products, counting the kept pairs only."""
        pairs = self.T * (self.S - (self.T - 1) / 2) if self.is_causal else self.T * self.S
        return 4.0 * self.B * self.N * pairs * self.H


CASES = {
    case.name: case
    for case in (
        Case("full-2k", 1, 2048, 2048, 8, 8, 64, False, "encoder"),
        Case("causal-2k", 1, 2048, 2048, 8, 8, 64, True, "prompt of a small decoder"),
        Case("full-4k", 1, 4096, 4096, 8, 8, 128, False, "encoder of a large model"),
        Case("causal-4k", 1, 4096, 4096, 8, 8, 128, True, "prompt of a large decoder"),
        Case("gqa-2k", 1, 2048, 2048, 32, 8, 128, True, "grouped queries"),
        Case("full-512", 1, 512, 512, 8, 8, 64, False, "short text"),
        Case("odd-1009", 1, 1009, 1013, 8, 8, 64, False, "lengths that no tile divides"),
    )
}
