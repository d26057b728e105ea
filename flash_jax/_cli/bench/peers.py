"""What a user would pick instead: attention of PyTorch, ONNX Runtime and OpenVINO.

Each function takes a case that its peer can do (subjects.SUBJECTS tells), and the inputs of
``exact.random_inputs``. It brings them into the layout and dtype that the peer likes best, before
the clock starts. Nothing here needs JAX.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np

from .cases import Case
from .subjects import Subject


def heads_first(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Turns arrays (B, T, N, H) into contiguous arrays (B, N, T, H), or those into these."""
    return [np.ascontiguousarray(np.swapaxes(x, 1, 2)) for x in arrays]


def torch_attention(case: Case, inputs: list[np.ndarray]) -> Subject:
    """Binds scaled_dot_product_attention, and its backward pass where the case has a gradient."""
    torch: Any = importlib.import_module("torch")
    kind = getattr(torch, case.dtype)
    q, k, v, *cotangent = (torch.tensor(x).to(kind) for x in heads_first(inputs))
    leaves = [x.requires_grad_(case.gradient) for x in (q, k, v)]
    keep, is_causal = None, case.is_causal
    if case.window is not None:
        keep = torch.ones(case.T, case.S, dtype=torch.bool).tril().triu(-case.window)
        is_causal = False

    def run() -> tuple[Any, ...]:
        out = torch.nn.functional.scaled_dot_product_attention(
            *leaves, attn_mask=keep, is_causal=is_causal, enable_gqa=case.N != case.K
        )
        return (out, *torch.autograd.grad(out, leaves, cotangent)) if case.gradient else (out,)

    def results() -> list[np.ndarray]:
        return heads_first([x.detach().float().numpy() for x in run()[: 1 + case.gradient]])

    return Subject(run, results)


def onnxruntime_attention(case: Case, inputs: list[np.ndarray]) -> Subject:
    """Binds MultiHeadAttention, or GroupQueryAttention for grouped heads."""
    feeds = {name: x.reshape(*x.shape[:2], -1) for name, x in zip("qkv", inputs, strict=True)}
    if case.N == case.K:
        attributes = {"num_heads": case.N, "unidirectional": int(case.is_causal)}
        return _onnx_subject(case, "MultiHeadAttention", feeds, ["out"], attributes)
    # A prompt, with an empty cache before it.
    empty = np.zeros((case.B, case.K, 0, case.H), np.float32)
    feeds |= {"past_k": empty, "past_v": empty}
    feeds |= {
        "last": np.full((case.B,), case.S - 1, np.int32),
        "total": np.array(case.S, np.int32),
    }
    attributes = {"num_heads": case.N, "kv_num_heads": case.K}
    outputs = ["out", "present_k", "present_v"]
    return _onnx_subject(case, "GroupQueryAttention", feeds, outputs, attributes)


def onnxruntime_cache(case: Case, inputs: list[np.ndarray]) -> Subject:
    """Binds GroupQueryAttention to a cache of float32, or of float16 where the case has 16 bits."""
    kind = np.float32 if case.dtype == "float32" else np.float16
    inputs = [x.astype(kind) for x in inputs]
    return _onnx_step(case, inputs, heads_first(inputs[1:3]), {}, {})


def onnxruntime_cache_int8(case: Case, inputs: list[np.ndarray]) -> Subject:
    """Binds GroupQueryAttention to a cache of int8, which has a scale per head and channel."""
    cache, scales = [], {}
    for name, x in zip(("k_scale", "v_scale"), heads_first(inputs[1:3]), strict=True):
        scales[name] = np.max(np.abs(x), axis=(0, 2), keepdims=True) / np.float32(127)
        cache.append(np.round(x / scales[name]).astype(np.int8))
    names = "k_quant_type", "v_quant_type"
    attributes = dict.fromkeys(names, "PER_CHANNEL") | {"kv_cache_bit_width": 8}
    return _onnx_step(case, inputs, cache, scales, attributes)


def _onnx_step(
    case: Case,
    inputs: list[np.ndarray],
    cache: list[np.ndarray],
    scales: dict[str, np.ndarray],
    attributes: dict[str, Any],
) -> Subject:
    """One token with a cache (B, K, S, H) each: its last slot is written in place, and all read."""
    runtime: Any = importlib.import_module("onnxruntime")
    last = (x[:, -1:].reshape(case.B, 1, -1) for x in inputs)
    arrays = dict(zip("qkv", last, strict=False))
    past = dict(zip(("past_k", "past_v"), cache, strict=True))
    counts = {"last": np.full((case.B,), case.S - 1, np.int32), "total": np.array(case.S, np.int32)}
    feeds = arrays | past | counts | scales
    # Between them come inputs that are not given: rotations, positions, a bias and sinks.
    names = [*list(feeds)[:7], *([""] * 5 if scales else []), *scales]
    outputs = ["out", "present_k", "present_v"]
    attributes = {"num_heads": case.N, "kv_num_heads": case.K, **attributes}
    session = _onnx_session("GroupQueryAttention", names, feeds, outputs, attributes)
    binding = session.io_binding()
    held = {name: runtime.OrtValue.ortvalue_from_numpy(x) for name, x in feeds.items()}
    held["out"] = runtime.OrtValue.ortvalue_from_numpy(np.zeros_like(arrays["q"]))
    for name in feeds:
        binding.bind_ortvalue_input(name, held[name])
    for name, x in zip(outputs, ("out", "past_k", "past_v"), strict=True):
        binding.bind_ortvalue_output(name, held[x])

    def results() -> list[np.ndarray]:
        session.run_with_iobinding(binding)
        out = held["out"].numpy().astype(np.float32)
        return [out.reshape(case.B, case.T, case.N, case.H)]

    return Subject(lambda: session.run_with_iobinding(binding), results)


def _onnx_subject(
    case: Case,
    operator: str,
    feeds: dict[str, np.ndarray],
    outputs: list[str],
    attributes: dict[str, int],
) -> Subject:
    """Opens a session of one of ONNX Runtime's own operators; its first output is (B, T, N * H)."""
    session = _onnx_session(operator, list(feeds), feeds, outputs, attributes)

    def run() -> np.ndarray:
        return session.run(outputs[:1], feeds)[0]

    return Subject(run, lambda: [run().reshape(case.B, case.T, case.N, case.H)])


def _onnx_session(
    operator: str,
    names: list[str],
    feeds: dict[str, np.ndarray],
    outputs: list[str],
    attributes: dict[str, Any],
) -> Any:
    """A session of one operator. Its first output is of the dtype of q, others of that of past."""
    onnx: Any = importlib.import_module("onnx")
    runtime: Any = importlib.import_module("onnxruntime")
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(x.dtype) for name, x in feeds.items()}
    parameters = [
        onnx.helper.make_tensor_value_info(name, kinds[name], x.shape) for name, x in feeds.items()
    ]
    stored = kinds.get("past_k", kinds["q"])
    results = [
        onnx.helper.make_tensor_value_info(name, stored if i else kinds["q"], None)
        for i, name in enumerate(outputs)
    ]
    node = onnx.helper.make_node(operator, names, outputs, domain="com.microsoft", **attributes)
    sets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([node], "attention", parameters, results)
    model = onnx.helper.make_model(graph, opset_imports=sets, ir_version=9)
    return runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def openvino_attention(case: Case, inputs: list[np.ndarray]) -> Subject:
    """Binds ScaledDotProductAttention, on arrays of the case's dtype and computed in it."""
    # The import would report its use over the network, from a fork of this process.
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]
    openvino: Any = importlib.import_module("openvino")
    operators = openvino.opset13
    precision = {"float32": "f32", "bfloat16": "bf16"}[case.dtype]
    kind = getattr(openvino.Type, precision)
    arrays = heads_first(inputs)
    parameters = [
        operators.parameter(list(x.shape), kind, name=name)
        for name, x in zip("qkv", arrays, strict=True)
    ]
    node = operators.scaled_dot_product_attention(*parameters, causal=case.is_causal)
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Model([node], parameters, "attention")
    request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
    narrow = case.dtype == "bfloat16"
    stored = [_bits_of_bfloat16(x) for x in arrays] if narrow else arrays
    feeds = {i: openvino.Tensor(x, openvino.Shape(x.shape), kind) for i, x in enumerate(stored)}

    def run() -> np.ndarray:
        return request.infer(feeds, share_inputs=True, share_outputs=True)[0]

    def results() -> list[np.ndarray]:
        return heads_first([_float32_of_bits(run()) if narrow else run()])

    return Subject(run, results)


def _bits_of_bfloat16(x: np.ndarray) -> np.ndarray:
    """Stores float32 that bfloat16 has in 16 bits; NumPy has no such dtype."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def _float32_of_bits(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
