"""Multi-head and grouped attention of Keras, in linear memory; needs the extra ``keras``.

Keras's layers project, attend and project again. What is replaced is the step in the middle, of
layers that exist: their weights, names, configs and files stay what they are. A subclass would not
do: for one, Keras makes an array (1, T, S) of ``use_causal_mask=True``.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal, NamedTuple, TypeVar

import jax
from jax import Array
from jax import numpy as jnp

from ._empty_rows import check_empty_rows
from ._layers import attend

try:
    import keras
except ImportError as error:
    raise ImportError("flash_jax.keras needs Keras: pip install -e '.[keras]'") from error

Model = TypeVar("Model", bound=keras.Layer)

_LAYERS = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
_METHODS = ("_compute_attention", "_compute_attention_mask")
_FUNCTIONS = ("train_function", "test_function", "predict_function", "generate_function")


def use_flash_attention(model: Model, *, empty_rows: Literal["zero", "mean"] = "zero") -> Model:
    """Makes the attention layers of a Keras model run this library; returns the same model.

    They are the ``keras.layers.MultiHeadAttention`` and ``keras.layers.GroupQueryAttention`` in
    it, and layers of subclasses that keep Keras's core, as ``CachedMultiHeadAttention`` of KerasHub
    does. Weights, names and files stay what they are. ``use_keras_attention`` is the way back.

    ``use_causal_mask``, ``sliding_window`` and the masks of padding that Keras passes on take no
    memory of T x S; an ``attention_mask`` is the array that it is. Dropout, of the layer's own seed
    generator, drops other probabilities than Keras drops, at the same rate.

    ``fit``, ``evaluate`` and ``predict`` of a model that ran before are compiled anew; so must be
    functions under a ``jax.jit`` of yours, and those of models that contain this one. A saved model
    is one of Keras's own: call this again after loading.

    Args:
        model: a model or a layer, with its attention layers in it: build it first.
        empty_rows: what a row that may read no key is before the output projection: "zero", or the
            "mean" of value over all S, as in layers of Keras without dropout. (Those with dropout
            have zero themselves.) Only rows of padding differ.

    Raises:
        ValueError: there is no such layer in the model, or empty_rows is another word.
        RuntimeError: the backend of Keras is not JAX.

    A call with ``return_attention_scores=True``, or over other axes than one of positions, keeps
    Keras's core, and warns.

    Example:
        >>> import numpy as np
        >>> layer = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4)
        >>> x = np.ones((1, 5, 8), np.float32)
        >>> before = layer(x, x, use_causal_mask=True)
        >>> after = use_flash_attention(layer)(x, x, use_causal_mask=True)
        >>> bool(np.allclose(before, after, atol=1e-6))
        True
    """
    if keras.config.backend() != "jax":
        raise RuntimeError(
            "the backend of Keras must be 'jax' (KERAS_BACKEND=jax, before Keras is imported); "
            f"it is {keras.config.backend()!r}"
        )
    check_empty_rows(empty_rows)
    layers = [layer for layer in model._flatten_layers() if _has_keras_core(layer)]
    if not layers:
        raise ValueError(
            "model must have a layer that attends as keras.layers.MultiHeadAttention or "
            f"keras.layers.GroupQueryAttention does, and be built; {model.name!r} has none"
        )
    for layer in layers:
        layer._compute_attention = functools.partial(_compute_attention, layer, empty_rows)
        if _is_own(layer, "call") and _is_own(layer, "_compute_attention_mask"):
            layer._compute_attention_mask = _compute_attention_mask
    _forget_compiled(model)
    return model


def use_keras_attention(model: Model) -> Model:
    """Undoes ``use_flash_attention``; returns the same model, which may have no such layers.

    Example:
        >>> import numpy as np
        >>> layer = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4)
        >>> x = np.ones((1, 5, 8), np.float32)
        >>> before = layer(x, x)
        >>> bool(np.all(use_keras_attention(use_flash_attention(layer))(x, x) == before))
        True
    """
    for layer in model._flatten_layers():
        if isinstance(layer, _LAYERS):
            for name in vars(layer).keys() & _METHODS:
                delattr(layer, name)
    _forget_compiled(model)
    return model


class _MaskParts(NamedTuple):
    """What Keras makes one array (B, T, S) of."""

    query_mask: Any = None  # (B, T)
    value_mask: Any = None  # (B, S)
    key_mask: Any = None  # (B, S)
    attention_mask: Any = None  # broadcastable to (B, T, S) or (B, N, T, S)
    use_causal_mask: bool = False


def _compute_attention_mask(query: Array, value: Array, **parts: Any) -> _MaskParts:
    """In place of a layer's own, where ``call`` hands the result to ``_compute_attention``."""
    return _MaskParts(**parts)


def _compute_attention(
    layer: Any,
    empty_rows: Literal["zero", "mean"],
    query: Array,
    key: Array,
    value: Array,
    attention_mask: Any = None,
    training: bool | None = None,
    return_attention_scores: bool = False,
    use_causal_mask: bool = False,
) -> tuple[Array, Array | None]:
    """In place of a layer's own: query (B, T, N, H), key (B, S, N, H) and value (B, S, N, Hv)."""
    grouped = isinstance(layer, keras.layers.GroupQueryAttention)
    scores = layer._return_attention_scores if grouped else return_attention_scores
    reason = "return_attention_scores=True" if scores else _other_axes(layer, query)
    if reason is not None:
        warnings.warn(f"{layer.name!r} keeps the attention of Keras: {reason}", stacklevel=2)
        if isinstance(attention_mask, _MaskParts):
            parts = attention_mask._asdict()
            attention_mask = type(layer)._compute_attention_mask(layer, query, value, **parts)
        options = {} if grouped else {"return_attention_scores": scores}
        return type(layer)._compute_attention(
            layer,
            query,
            key,
            value,
            attention_mask,
            training,
            use_causal_mask=use_causal_mask,
            **options,
        )
    if grouped and _is_own(layer, "call"):  # it has repeated each head, and XLA undoes that
        key, value = (x[:, :, :: layer.num_repeats] for x in (key, value))
    options = {}
    if isinstance(attention_mask, _MaskParts):
        window = layer.sliding_window if grouped else layer._sliding_window
        if window is not None:
            options["local_window_size"] = (window - 1, window - 1)
        options |= _padding(attention_mask, query.shape[1], key.shape[1])
        use_causal_mask = attention_mask.use_causal_mask
        attention_mask = attention_mask.attention_mask
    if training and layer.dropout:
        seed = layer._dropout_layer.seed_generator.next()
        options["dropout_rate"] = layer.dropout
        options["dropout_rng"] = jax.random.wrap_key_data(
            jnp.asarray(seed, "uint32"), impl="threefry2x32"
        )
    out = attend(
        query,
        key,
        value,
        mask=_with_heads(attention_mask),
        scale=layer._inverse_sqrt_head_dim if grouped else layer._inverse_sqrt_key_dim,
        is_causal=bool(use_causal_mask),
        empty_rows=empty_rows,
        **options,
    )
    return out, None


def _padding(parts: _MaskParts, T: int, S: int) -> dict[str, Array]:
    """Masks of padding as segments: queries and keys that exist are in segment 0, others in none."""
    queries = _and(parts.query_mask)
    keys = _and(parts.value_mask, parts.key_mask)
    if queries is None and keys is None:
        return {}
    return {
        "query_segment_ids": jnp.zeros(T, "int32") if queries is None else jnp.where(queries, 0, 1),
        "key_value_segment_ids": jnp.zeros(S, "int32") if keys is None else jnp.where(keys, 0, 2),
    }


def _and(*masks: Any) -> Array | None:
    """Where all masks of a batch that are given are True."""
    given = [jnp.asarray(mask, bool) for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, given) if given else None


def _with_heads(mask: Any) -> Array | None:
    """An ``attention_mask`` with the axis of heads, which it lacks where it has that of the batch."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    return mask[:, None] if mask.ndim == 3 else mask


def _other_axes(layer: Any, query: Array) -> str | None:
    """Why this call is not attention over the one axis of positions."""
    axes = getattr(layer, "_attention_axes", (1,))
    if query.ndim == 4 and axes == (1,):
        return None
    return f"it attends over axes {axes} of {query.ndim - 1}, not over axis 1 of 3"


def _has_keras_core(layer: Any) -> bool:
    return isinstance(layer, _LAYERS) and _is_own(layer, "_compute_attention")


def _is_own(layer: Any, method: str) -> bool:
    """Whether the class of the layer has this method from Keras."""
    return any(getattr(type(layer), method) is getattr(x, method) for x in _LAYERS)


def _forget_compiled(model: Any) -> None:
    """Lets Keras make the functions anew that it traced: of the model, and of models in it."""
    for layer in model._flatten_layers():
        for name in _FUNCTIONS:
            if getattr(layer, name, None) is not None:
                setattr(layer, name, None)
