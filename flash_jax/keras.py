"""Attention layers of Keras, in linear memory; needs the extra ``keras``.

Keras's layers project, attend and project again. This module replaces the step in the middle, in
layers that exist: weights, names, configs and files stay what they are. A subclass would cost
memory: for any class but its own, Keras makes an array (1, T, S) of ``use_causal_mask=True``.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal, NamedTuple, TypeVar

import jax
from jax import Array
from jax import numpy as jnp

from ._api.empty_rows import check_empty_rows
from ._frameworks.layers import attend

try:
    import keras
except ImportError as error:
    raise ImportError(
        "flash_jax.keras needs Keras on JAX: pip install -e '.[keras]' and the environment variable "
        "KERAS_BACKEND=jax"
    ) from error

Model = TypeVar("Model", bound=keras.Layer)

_LAYERS = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
_METHODS = {"_compute_attention", "_compute_attention_mask", "_use_fused_attention_op"}
_COMPILED = ("train_function", "test_function", "predict_function", "generate_function")


def use_flash_attention(model: Model, *, empty_rows: Literal["zero", "mean"] = "zero") -> Model:
    """Makes the attention layers of a Keras model run this library; returns the same model.

    The function changes two kinds of layers:

    - ``keras.layers.MultiHeadAttention`` and ``keras.layers.GroupQueryAttention``, and subclasses
      that attend as these do, such as KerasHub's ``CachedMultiHeadAttention``;
    - other classes whose ``_compute_attention`` calls ``keras.ops.dot_product_attention``, such as
      those of KerasHub's Llama, Mistral, Qwen and Gemma.

    In the first kind ``use_causal_mask``, ``sliding_window`` and Keras's masks of padding take no
    memory of T x S; an ``attention_mask`` is the array that it is. Dropout uses the seed generator
    of the layer and Keras's rate, but drops other probabilities than Keras does. A call with
    ``return_attention_scores=True``, or over other axes than the one of positions, keeps Keras's
    attention and warns. A layer of the second kind does so where it does not call the function:
    Gemma's with dropout, for example.

    Keras compiles ``fit``, ``evaluate``, ``predict`` and ``generate`` anew, for models in the model
    too. Functions under your own ``jax.jit``, and models around this one, keep what they were
    traced with: ``compile`` those again. ``jax.export`` of ``model.stateless_call`` takes symbolic
    batch sizes and lengths. A saved model is one of Keras's own: call this again after loading.

    Args:
        model: a model or a layer, built: its attention layers must be there.
        empty_rows: a row that may read no key, such as a padded query, is "zero" before the output
            projection, or the "mean" of value over all S. Keras has the mean in layers without
            dropout, and zero in those with it.

    Raises:
        ValueError: the model has no such layer, or empty_rows is neither of the two.
        RuntimeError: Keras has another backend than JAX.

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
            "the backend of Keras must be 'jax' (KERAS_BACKEND=jax before Keras is imported); "
            f"it is {keras.config.backend()!r}"
        )
    check_empty_rows(empty_rows)
    replaced = [_replace(layer, empty_rows) for layer in model._flatten_layers()]
    if not any(replaced):
        raise ValueError(
            "model must have layers of keras.layers.MultiHeadAttention or GroupQueryAttention, or "
            "others whose _compute_attention calls keras.ops.dot_product_attention, and be built; "
            f"{model.name!r} has none"
        )
    _forget_compiled(model)
    return model


def use_keras_attention(model: Model) -> Model:
    """Undoes ``use_flash_attention``, if it was called; returns the same model.

    Example:
        >>> import numpy as np
        >>> layer = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4)
        >>> x = np.ones((1, 5, 8), np.float32)
        >>> before = layer(x, x)
        >>> bool(np.all(use_keras_attention(use_flash_attention(layer))(x, x) == before))
        True
    """
    for layer in model._flatten_layers():
        for name in vars(layer).keys() & _METHODS:
            delattr(layer, name)
    _forget_compiled(model)
    return model


def _replace(layer: Any, empty_rows: Literal["zero", "mean"]) -> bool:
    """Gives a layer our methods, and says whether it has attention that is known here."""
    if _attends_as_keras(layer):
        layer._compute_attention = functools.partial(_compute_attention, layer, empty_rows)
        if _from_keras(layer, "call") and _from_keras(layer, "_compute_attention_mask"):
            layer._compute_attention_mask = _compute_attention_mask
        return True
    core = getattr(type(layer), "_compute_attention", None)
    if "dot_product_attention" not in getattr(getattr(core, "__code__", None), "co_names", ()):
        return False
    layer._compute_attention = functools.partial(_with_our_op, layer, empty_rows)
    if hasattr(layer, "_use_fused_attention_op"):  # Keras's own says no on CPUs
        layer._use_fused_attention_op = functools.partial(_has_no_dropout, layer)
    return True


def _attends_as_keras(layer: Any) -> bool:
    return isinstance(layer, _LAYERS) and _from_keras(layer, "_compute_attention")


def _from_keras(layer: Any, method: str) -> bool:
    return any(getattr(type(layer), method) is getattr(x, method) for x in _LAYERS)


def _has_no_dropout(layer: Any) -> bool:
    return not layer.dropout


def _forget_compiled(model: Any) -> None:
    """Makes Keras trace its compiled functions anew."""
    for layer in model._flatten_layers():
        for name in _COMPILED:
            if getattr(layer, name, None) is not None:
                setattr(layer, name, None)


class _MaskParts(NamedTuple):
    """The masks that Keras would combine into one array (B, T, S)."""

    query_mask: Any = None  # (B, T)
    value_mask: Any = None  # (B, S)
    key_mask: Any = None  # (B, S)
    attention_mask: Any = None  # broadcastable to (B, T, S) or (B, N, T, S)
    use_causal_mask: bool = False


def _compute_attention_mask(query: Array, value: Array, **parts: Any) -> _MaskParts:
    """Replaces Keras's method; ``call`` hands the result to ``_compute_attention``."""
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
    """Replaces Keras's method: query (B, T, N, H), key (B, S, N, H) and value (B, S, N, Hv)."""
    grouped = isinstance(layer, keras.layers.GroupQueryAttention)
    scores = layer._return_attention_scores if grouped else return_attention_scores
    kept = "return_attention_scores=True" if scores else _other_axes(layer, query)
    if kept:
        warnings.warn(f"{layer.name!r} keeps Keras's attention: {kept}", stacklevel=2)
        if isinstance(attention_mask, _MaskParts):
            parts = attention_mask._asdict()
            attention_mask = type(layer)._compute_attention_mask(layer, query, value, **parts)
        options = {} if grouped else {"return_attention_scores": scores}
        options |= {"training": training, "use_causal_mask": use_causal_mask}
        core = type(layer)._compute_attention
        return core(layer, query, key, value, attention_mask, **options)

    options: dict[str, Any] = {"is_causal": use_causal_mask}
    if grouped and _from_keras(layer, "call"):  # XLA leaves out the repeats
        key, value = key[:, :, :: layer.num_repeats], value[:, :, :: layer.num_repeats]
    if isinstance(attention_mask, _MaskParts):
        options = _mask_options(attention_mask, query.shape[1], key.shape[1])
        window = layer.sliding_window if grouped else layer._sliding_window
        if window is not None:
            options["local_window_size"] = window - 1
        attention_mask = attention_mask.attention_mask
    if attention_mask is not None:
        attention_mask = jnp.asarray(attention_mask)
        if attention_mask.ndim == 3:  # (B, T, S)
            attention_mask = attention_mask[:, None]
    if training and layer.dropout:
        seed = jnp.asarray(layer._dropout_layer.seed_generator.next(), "uint32")
        options["dropout_rng"] = jax.random.wrap_key_data(seed, impl="threefry2x32")
        options["dropout_rate"] = layer.dropout
    scale = layer._inverse_sqrt_head_dim if grouped else layer._inverse_sqrt_key_dim
    options |= {"mask": attention_mask, "scale": scale, "empty_rows": empty_rows}
    return attend(query, key, value, **options), None


def _other_axes(layer: Any, query: Array) -> str | None:
    """Why this call is not attention over the one axis of positions."""
    axes = tuple(getattr(layer, "_attention_axes", (1,)))
    if query.ndim == 4 and axes == (1,):
        return None
    return f"attention_axes must be (1,) of inputs of 3 axes; they are {axes} of {query.ndim - 1}"


def _mask_options(parts: _MaskParts, T: int, S: int) -> dict[str, Any]:
    """Options for all parts but the array: queries and keys that are no padding are segment 0."""
    options: dict[str, Any] = {"is_causal": bool(parts.use_causal_mask)}
    queries, keys = _both(parts.query_mask, None), _both(parts.value_mask, parts.key_mask)
    if queries is not None or keys is not None:
        zeros = functools.partial(jnp.zeros, dtype="int32")
        options["query_segment_ids"] = zeros(T) if queries is None else jnp.where(queries, 0, 1)
        options["key_value_segment_ids"] = zeros(S) if keys is None else jnp.where(keys, 0, 2)
    return options


def _both(a: Any, b: Any) -> Array | None:
    given = [jnp.asarray(x, bool) for x in (a, b) if x is not None]
    return functools.reduce(jnp.logical_and, given) if given else None


def _with_our_op(layer: Any, empty_rows: Literal["zero", "mean"], *args: Any, **kwargs: Any) -> Any:
    """Runs the layer's own method, with ``keras.ops.dot_product_attention`` replaced meanwhile."""
    theirs, calls = keras.ops.dot_product_attention, []

    def dot_product_attention(
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,
        mask: Any = None,
        scale: Any = None,
        is_causal: bool = False,
        flash_attention: bool | None = None,
        attn_logits_soft_cap: float | None = None,
    ) -> Any:
        calls.append(None)
        options = {"scale": scale, "is_causal": is_causal, "empty_rows": empty_rows}
        options["logits_soft_cap"] = attn_logits_soft_cap
        return attend(query, key, value, bias, mask, **options)

    keras.ops.dot_product_attention = dot_product_attention
    try:
        out = type(layer)._compute_attention(layer, *args, **kwargs)
    finally:
        keras.ops.dot_product_attention = theirs
    if not calls:
        warnings.warn(
            f"{layer.name!r} keeps its own attention: here it does not call "
            "keras.ops.dot_product_attention",
            stacklevel=2,
        )
    return out
