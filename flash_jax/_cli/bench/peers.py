"""What a user would pick instead: attention of PyTorch, ONNX Runtime and OpenVINO.

Each function takes a case, and float32 query (B, T, N, H), key and value (B, S, K, H). It binds
them to a run, which takes nothing more and gives the output heads first, (B, N, T, H). Where
the peer is not installed or can't do the case, the function returns None.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from .cases import Case

Run = Callable[[], np.ndarray]


def optional(name: str) -> Any:
    """Imports a module, or gives None where it is not installed."""
    # The import of OpenVINO would report its use over the network, from a fork of this process.
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def versions() -> dict[str, str]:
    """Lists the versions of the peers that are installed."""
    modules = {name: optional(name) for name in ("torch", "onnxruntime", "openvino")}
    return {name: module.__version__ for name, module in modules.items() if module is not None}


def heads_first(*arrays: Any) -> list[np.ndarray]:
    """Turns arrays (B, T, N, H) into contiguous arrays (B, N, T, H)."""
    return [np.ascontiguousarray(np.swapaxes(np.asarray(x), 1, 2)) for x in arrays]


def torch_attention(case: Case, q: Any, k: Any, v: Any) -> Run | None:
    """Binds scaled_dot_product_attention, and its backward pass where the case has a gradient."""
    torch = optional("torch")
    if torch is None or set(case.options) - {"local_window_size"}:
        return None
    kind = getattr(torch, case.dtype)
    tensors = [torch.tensor(x).to(kind).requires_grad_(case.gradient) for x in heads_first(q, k, v)]
    keep, is_causal = None, case.is_causal
    if "local_window_size" in case.options:
        left, _ = case.options["local_window_size"]
        keep, is_causal = torch.ones(case.T, case.S, dtype=torch.bool).tril().triu(-left), False

    def run() -> np.ndarray:
        out = torch.nn.functional.scaled_dot_product_attention(
            *tensors, attn_mask=keep, is_causal=is_causal, enable_gqa=case.N != case.K
        )
        if case.gradient:
            torch.autograd.grad(out.sum(), tensors)
        return out.detach().float().numpy()

    return run


def onnxruntime_attention(case: Case, q: Any, k: Any, v: Any) -> Run | None:
    """Binds MultiHeadAttention, or GroupQueryAttention for grouped heads, in float32."""
    onnx, runtime = optional("onnx"), optional("onnxruntime")
    if onnx is None or runtime is None or case.options or case.gradient or case.dtype != "float32":
        return None
    if case.N != case.K:
        return _group_query_attention(onnx, runtime, case, q, k, v) if case.is_causal else None
    feeds = {
        name: np.asarray(x).reshape(*x.shape[:2], -1)
        for name, x in zip("qkv", (q, k, v), strict=True)
    }
    attributes = {"num_heads": case.N, "unidirectional": int(case.is_causal)}
    return _onnx_run(onnx, runtime, case, "MultiHeadAttention", feeds, ["out"], attributes)


def _group_query_attention(onnx: Any, runtime: Any, case: Case, q: Any, k: Any, v: Any) -> Run:
    """Binds GroupQueryAttention to a prompt, with an empty cache before it."""
    feeds = {
        name: np.asarray(x).reshape(*x.shape[:2], -1)
        for name, x in zip("qkv", (q, k, v), strict=True)
    }
    empty = np.zeros((case.B, case.K, 0, case.H), np.float32)
    feeds |= {"past_k": empty, "past_v": empty}
    feeds |= {
        "last": np.full((case.B,), case.S - 1, np.int32),
        "total": np.array(case.S, np.int32),
    }
    attributes = {"num_heads": case.N, "kv_num_heads": case.K}
    outputs = ["out", "present_k", "present_v"]
    return _onnx_run(onnx, runtime, case, "GroupQueryAttention", feeds, outputs, attributes)


def _onnx_run(
    onnx: Any,
    runtime: Any,
    case: Case,
    operator: str,
    feeds: dict[str, np.ndarray],
    outputs: list[str],
    attributes: dict[str, int],
) -> Run:
    """Opens a session of one of ONNX Runtime's own operators; its first output is (B, T, N * H)."""
    kinds = {"float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32}
    inputs = [
        onnx.helper.make_tensor_value_info(name, kinds[x.dtype.name], x.shape)
        for name, x in feeds.items()
    ]
    results = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs
    ]
    node = onnx.helper.make_node(
        operator, list(feeds), outputs, domain="com.microsoft", **attributes
    )
    sets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([node], "attention", inputs, results)
    model = onnx.helper.make_model(graph, opset_imports=sets, ir_version=9)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def run() -> np.ndarray:
        out = session.run(outputs[:1], feeds)[0]
        return np.swapaxes(out.reshape(case.B, case.T, case.N, case.H), 1, 2)

    return run


def openvino_attention(case: Case, q: Any, k: Any, v: Any, precision: str) -> Run | None:
    """Binds ScaledDotProductAttention, computed in "f32" or "bf16"."""
    openvino = optional("openvino")
    if openvino is None or not case.plain or (precision == "f32" and case.dtype != "float32"):
        return None
    operators = openvino.opset13
    arrays = heads_first(q, k, v)
    parameters = [
        operators.parameter(list(x.shape), np.float32, name=name)
        for name, x in zip("qkv", arrays, strict=True)
    ]
    node = operators.scaled_dot_product_attention(*parameters, causal=case.is_causal)
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Model([node], parameters, "attention")
    request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
    feeds = dict(enumerate(arrays))
    return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)[0]
