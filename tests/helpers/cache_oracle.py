"""What a cache means: a list of tokens per row, in NumPy, sharing no code with flash_jax."""

import numpy as np
from oracle import attention


class Rows:
    """A cache of ``slots`` positions per row that reads ``window`` of them; None: all."""

    def __init__(self, B, slots, value_dim, window=None):
        self.slots, self.value_dim, self.window = slots, value_dim, window
        self.rows = [[] for _ in range(B)]  # of (key (K, H), value (K, Hv))
        self.first = [0] * B  # what is below is not held any more
        self.last = [(0, 0)] * B  # tokens of the last append, and the padding before them

    def append(self, key, value, lengths, left_padded=False):
        T = key.shape[1]
        for b, n in enumerate(lengths):
            skip = T - n if left_padded else 0
            self.rows[b] = self.rows[b] + [(key[b, t], value[b, t]) for t in range(skip, skip + n)]
            self.last[b] = n, skip
            if self.window is not None:
                self.first[b] = max(self.first[b], len(self.rows[b]) - self.slots)

    def truncate(self, lengths):
        for b, n in enumerate(lengths):
            self.rows[b] = self.rows[b][:n]
            self.first[b] = min(self.first[b], len(self.rows[b])) if self.rows[b] else 0

    def reorder(self, order):
        self.rows = [self.rows[b] for b in order]
        self.first = [self.first[b] for b in order]
        self.last = [self.last[b] for b in order]

    @property
    def lengths(self):
        return [len(row) for row in self.rows]

    def lost(self, b, t):
        """Whether the query at position t should read a token that is not held."""
        if self.window is None:
            return t >= self.slots
        return max(0, t - self.window + 1) < self.first[b]

    def attend(self, query, **options):
        """Output (B, T, N, Hv) and lse (B, N, T) in float64."""
        B, T, N, _ = query.shape
        out, lse = np.zeros((B, T, N, self.value_dim)), np.full((B, N, T), -np.inf)
        for b, row in enumerate(self.rows):
            (n, skip), L = self.last[b], len(row)
            if not n:
                continue
            key, value = (np.stack(x)[None] for x in zip(*row, strict=True))
            window = None if self.window is None else (self.window - 1, 0)
            t = slice(skip, skip + n)
            of_row = {"is_causal": True, "query_offset": L - n, "local_window_size": window}
            result = attention(query[b : b + 1, t], key, value, **of_row | options)
            out[b, t], lse[b, :, t] = result[0][0], result[1][0]
            lost = [i for i in range(n) if self.lost(b, L - n + i)]
            out[b, skip + np.array(lost, int)] = np.nan
            lse[b][:, skip + np.array(lost, int)] = np.nan
        return out, lse
