"""The arguments of one function for another: written once, seen in both."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def same_arguments(written: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Decorates a function that passes ``*args`` and ``**kwargs`` on to ``written``.

    Type checkers, ``inspect`` and ``help`` then see the parameters of ``written``, with their
    defaults, and the function's own result. The function itself is returned, not a wrapper.
    """

    def decorate(f: Callable[..., R]) -> Callable[P, R]:
        own = inspect.signature(f).return_annotation
        shown: Any = f  # type checkers know no signature that can be set
        shown.__signature__ = inspect.signature(written).replace(return_annotation=own)
        shown.__annotations__ = {**written.__annotations__, "return": own}
        return f

    return decorate
