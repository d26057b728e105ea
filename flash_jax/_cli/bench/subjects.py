"""The list of what is measured: what each subject can do, what it needs, and where it is built.

This module imports no subject: the parent reads the list, and a worker builds one of it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .cases import Case

OURS, OURS_INT8, TORCH = "flash_jax", "flash_jax int8", "PyTorch"

_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}


class Subject(NamedTuple):
    """One implementation on one case, ready to run."""

    run: Callable[[], Any]  # returns when the work is done
    results: Callable[[], list[np.ndarray]]  # output and, with a gradient, that of query
    compile_seconds: float | None = None
    temporary_bytes: int | None = None


class Entry(NamedTuple):
    """How a worker comes to a subject.

    ``module`` is relative to this package, if it begins with a dot. Its ``function`` takes a case
    and its inputs (exact.random_inputs), and gives a Subject.
    """

    module: str
    function: str
    can: Callable[[Case], bool]
    needs: tuple[str, ...] = ()  # modules that must be installed; with none it is built on JAX
    coarse: float = 0.0  # an error that its format may have, whatever the inputs' dtype
    python: str = sys.executable

    def tolerance(self, case: Case) -> float:
        """The largest error that a result of the case may have."""
        return max(self.coarse, _TOLERANCES[case.dtype])


def _decodes(case: Case) -> bool:
    return case.keys is not None and _no_options(case)


def _jax_nn_can(case: Case) -> bool:
    return case.documents == 1 and case.density is None


def _torch_can(case: Case) -> bool:
    return case.documents == 1 and case.filled is None and case.density is None


def _onnxruntime_can(case: Case) -> bool:
    grouped = case.N != case.K
    return _no_options(case) and case.dtype == "float32" and (case.is_causal or not grouped)


def _openvino_can(case: Case) -> bool:
    return _no_options(case) and case.N == case.K


def _no_options(case: Case) -> bool:
    return not case.options and not case.gradient


SUBJECTS = {
    OURS: Entry(".jax_subjects", "ours", lambda _: True),
    OURS_INT8: Entry(".jax_subjects", "ours_int8", lambda case: not case.gradient, coarse=0.1),
    "jax.nn": Entry(".jax_subjects", "jax_nn", _jax_nn_can),
    "flash_jax cache": Entry(".jax_subjects", "ours_cached", _decodes),
    "flash_jax cache int8": Entry(".jax_subjects", "ours_cached_int8", _decodes, coarse=0.1),
    TORCH: Entry(".peers", "torch_attention", _torch_can, ("torch",)),
    "ONNX Runtime": Entry(
        ".peers", "onnxruntime_attention", _onnxruntime_can, ("onnxruntime", "onnx")
    ),
    "OpenVINO": Entry(
        ".peers",
        "openvino_attention",
        lambda case: _openvino_can(case) and case.dtype == "float32",
        ("openvino",),
    ),
    "OpenVINO bf16": Entry(
        ".peers",
        "openvino_attention",
        lambda case: _openvino_can(case) and case.dtype == "bfloat16",
        ("openvino",),
    ),
}

# What bounds a case, alone: the product of two matrices of this size, or reading as many bytes.
MACHINE = Entry(".jax_subjects", "best_of_machine", lambda _: True)
MATMUL = 2048


def best_work(case: Case) -> float:
    """Counts what MACHINE does in one run: operations, or bytes."""
    return case.nbytes if case.bound_by_memory else 2.0 * MATMUL**3


def versions(modules: tuple[str, ...]) -> dict[str, str | None]:
    """Finds the versions of modules, without importing them; None is not installed."""
    return {module: _version(module) for module in modules}


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:  # the package has another name
        return "unknown version"
