"""What a user would pick instead: each peer's attention as a function that has everything bound.

Every function takes a case and float32 arrays (B, T, N, H), and returns the run, whose result is
the output heads first, or None where the peer is not installed or does not do the case.
"""

from collections.abc import Callable

import numpy as np
from cases import Case

try:
    import torch
except ImportError:
    torch = None
try:
    import onnx
    import onnxruntime
except ImportError:
    onnx = onnxruntime = None
try:
    import openvino
except ImportError:
    openvino = None

Run = Callable[[], np.ndarray]


def heads_first(*arrays: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(np.swapaxes(np.asarray(x), 1, 2)) for x in arrays]


def plain(case: Case) -> bool:
    """Whether the case is one that every peer has: no options, as many key heads as query heads."""
    return not (case.options or case.gradient or case.kernel) and case.N == case.K


def onnxruntime_attention(case: Case, q, k, v) -> Run | None:
    """The operator MultiHeadAttention of ONNX Runtime, float32."""
    if onnxruntime is None or onnx is None or not plain(case):
        return None
    width = case.N * case.H
    tensor = lambda name: onnx.helper.make_tensor_value_info(  # noqa: E731
        name, onnx.TensorProto.FLOAT, [case.B, case.T, width]
    )
    node = onnx.helper.make_node(
        "MultiHeadAttention",
        ["q", "k", "v"],
        ["out"],
        domain="com.microsoft",
        num_heads=case.N,
        unidirectional=int(case.is_causal),
    )
    graph = onnx.helper.make_graph([node], "attention", [*map(tensor, "qkv")], [tensor("out")])
    sets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=sets, ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = {
        name: np.asarray(x).reshape(case.B, case.T, width)
        for name, x in zip("qkv", (q, k, v), strict=True)
    }

    def run() -> np.ndarray:
        (out,) = session.run(None, inputs)
        return np.swapaxes(out.reshape(case.B, case.T, case.N, case.H), 1, 2)

    return run


def openvino_attention(case: Case, q, k, v, precision: str) -> Run | None:
    """OpenVINO's ScaledDotProductAttention, computed in "f32" or "bf16"."""
    if openvino is None or not plain(case):
        return None
    operators = openvino.opset13
    parameters = [
        operators.parameter([case.B, case.N, case.T, case.H], np.float32, name=name)
        for name in "qkv"
    ]
    node = operators.scaled_dot_product_attention(*parameters, causal=case.is_causal)
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(
        openvino.Model([node], parameters, "attention"), "CPU", hints
    )
    request = compiled.create_infer_request()
    inputs = dict(enumerate(heads_first(q, k, v)))

    def run() -> np.ndarray:
        return request.infer(inputs, share_inputs=True, share_outputs=True)[0]

    return run


def torch_attention(case: Case, q, k, v, dtype: str = "float32") -> Run | None:
    """PyTorch's scaled_dot_product_attention; of a gradient case, with its backward pass."""
    if torch is None or set(case.options) - {"local_window_size"}:
        return None
    kind = getattr(torch, dtype)
    tensors = [torch.tensor(x).to(kind).requires_grad_(case.gradient) for x in heads_first(q, k, v)]
    keep, is_causal = None, case.is_causal
    if "local_window_size" in case.options:
        left, _ = case.options["local_window_size"]
        keep, is_causal = torch.ones(case.T, case.T, dtype=torch.bool).tril().triu(-left), False

    def run() -> np.ndarray:
        out = torch.nn.functional.scaled_dot_product_attention(
            *tensors, attn_mask=keep, is_causal=is_causal, enable_gqa=case.N != case.K
        )
        if case.gradient:
            torch.autograd.grad(out.sum(), tensors)
        return out.detach().float().numpy()

    return run
