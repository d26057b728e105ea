"""``jax.nn.dot_product_attention`` replaced for a while, and its calls counted."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

from .._checks.numbers import check_bool
from .dot_product_attention import dot_product_attention

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.Lock()
_active: list[Patch] = []  # of all threads


def patch_jax_nn(*, any_implementation: bool = False, **options: Any) -> Patch:
    """Puts ``flash_jax.dot_product_attention`` in the place of JAX's for a while.

    The patch is a context manager, and a decorator of functions. At its end
    ``jax.nn.dot_product_attention`` is what it was before, after exceptions, too. The patch reaches
    code that looks the name up in ``jax.nn`` when it is called or traced:
    ``nnx.MultiHeadAttention`` without dropout, for example. It does not reach names from
    ``from jax.nn import dot_product_attention``. Functions under ``jax.jit`` keep what they were
    traced with, within the patch and after it, until ``jax.clear_caches()``. The patch holds for
    all threads of the process.

    Args:
        any_implementation: ignore the argument ``implementation`` of calls; otherwise "cudnn"
            raises.
        options: keywords of ``flash_jax.dot_product_attention``, for calls that leave them out.

    Returns:
        The patch. Its ``calls`` counts the calls within it: a function under ``jax.jit`` calls once
        per trace.

    Raises:
        TypeError: any_implementation is no bool, or the function has no such option.

    Warns:
        UserWarning: the patch ends without a call and without an exception: it did nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> with patch_jax_nn() as patch:
        ...     out = jax.nn.dot_product_attention(x, x, x, is_causal=True)
        >>> patch.calls
        1
    """
    any_implementation = check_bool("any_implementation", any_implementation)
    parameters = inspect.signature(dot_product_attention).parameters.values()
    known = [x.name for x in parameters if x.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise TypeError(f"options must be among {', '.join(known)}; one is {name}")
    return Patch(any_implementation, options)


class Patch:
    """What ``patch_jax_nn`` returns.

    Attributes:
        calls: how often ``jax.nn.dot_product_attention`` was called within, by any thread.
    """

    def __init__(
        self, any_implementation: bool, options: dict[str, Any], stacklevel: int = 2
    ) -> None:
        self.calls = 0
        self._settings = any_implementation, options
        self._stacklevel = stacklevel  # of the caller's line, seen from __exit__
        self._before: Any = None

        @functools.wraps(dot_product_attention)
        def function(*args: Any, **kwargs: Any) -> Any:
            with _lock:
                for patch in _active:  # those around this one, too
                    patch.calls += 1
            if any_implementation:
                kwargs.pop("implementation", None)
            return dot_product_attention(*args, **{**options, **kwargs})

        self._function = function

    def __enter__(self) -> Patch:
        with _lock:
            if self in _active:
                raise RuntimeError("patch_jax_nn() must be called for each `with`; it is active")
            self.calls = 0
            self._before = jax.nn.dot_product_attention
            jax.nn.dot_product_attention = self._function
            _active.append(self)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with _lock:
            _active.remove(self)
            over = [patch for patch in _active if patch._before is self._function]
            if over:  # another thread's, which ends later
                over[0]._before = self._before
            else:
                jax.nn.dot_product_attention = self._before
        if kind is None and not self.calls:
            warnings.warn(
                "patch_jax_nn() did nothing: jax.nn.dot_product_attention was not called within "
                "it. Functions that were traced before keep what they were traced with, until "
                "jax.clear_caches(); and layers with einsums of their own never call it",
                stacklevel=self._stacklevel,
            )

    def __call__(self, f: Callable[P, R]) -> Callable[P, R]:
        """f, with a patch of its own around every call."""

        @functools.wraps(f)
        def patched(*args: Any, **kwargs: Any) -> Any:
            with Patch(*self._settings, stacklevel=self._stacklevel + 1):
                return f(*args, **kwargs)

        return patched
