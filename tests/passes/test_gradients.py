"""Derivatives: of every operand, in both modes, behind masks and through transformations."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from gradient_oracle import assert_gradient, attention_gradients
from hypothesis import strategies as st
from jax import export, lax
from jax import numpy as jnp
from jax.test_util import check_grads
from oracle import kept_pairs, positions

from flash_jax import (
    CausalMask,
    FlashAttentionConfig,
    LengthMask,
    PrefixMask,
    WindowMask,
    dot_product_attention,
    flash_attention,
    flash_attention_forward,
    flash_attention_with_lse,
    flash_mha,
)

B, T, S, N, K, H, Hv = 2, 11, 17, 6, 3, 5, 3
TILES = (5, 3)

SCORING = "bias", "scale", "logits_soft_cap", "alibi_slopes", "sinks"
DIFFERENTIABLE = "query", "key", "value", *SCORING
STATIC = "is_causal", "local_window_size", "dropout_rate", "block_sizes"
MASKING = (
    "mask", "is_causal", "query_offset", "local_window_size", "query_seq_lengths",
    "key_value_seq_lengths", "query_segment_ids", "key_value_segment_ids",
)  # fmt: skip


def split(call):
    """A call's differentiable arrays, its other arrays, and what is compiled in."""
    differentiable = {name: call[name] for name in DIFFERENTIABLE if name in call}
    static = tuple((name, call[name]) for name in STATIC if name in call)
    arrays = {name: x for name, x in call.items() if name not in (*DIFFERENTIABLE, *STATIC)}
    return differentiable, arrays, static


@functools.partial(jax.jit, static_argnums=3)
def pulled_back(differentiable, arrays, cotangents, static):
    """Gradients of flash_attention_with_lse, by name."""
    call = functools.partial(flash_attention_with_lse, **arrays, **dict(static))
    return jax.vjp(lambda x: call(**x), differentiable)[1](cotangents)[0]


def gradients(call, cotangents):
    differentiable, arrays, static = split(call)
    return pulled_back(differentiable, arrays, cotangents, static)


def plain_attention(differentiable, kept, distance, dropout):
    """The formula with every score at once; probabilities have the dtype of query."""
    query, key, value, bias, scale, cap, slopes, sinks = map(differentiable.get, DIFFERENTIABLE)
    sum_dtype = jnp.promote_types(query.dtype, jnp.float32)
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    s = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=sum_dtype)
    s = s * (query.shape[-1] ** -0.5 if scale is None else scale)
    if cap is not None:
        s = cap * jnp.tanh(s / cap)
    if slopes is not None:
        s = s - slopes[:, None, None] * distance.astype(s.dtype)
    if bias is not None:
        s = s + jnp.where(kept, bias, 0).astype(s.dtype)
    s = jnp.where(kept, s, -jnp.inf)
    m = jnp.max(s, axis=-1, keepdims=True)
    shift = lax.stop_gradient(jnp.where(jnp.isneginf(m), 0, m))
    p = jnp.exp(s - shift)
    l = jnp.sum(p, axis=-1, keepdims=True)
    if sinks is not None:
        l = l + jnp.exp(sinks[:, None, None] - shift)
    empty, l = l == 0, jnp.where(l == 0, 1, l)
    p = (p / l * dropout).astype(query.dtype)
    out = jnp.einsum("bnts,bsnh->btnh", p, value, preferred_element_type=sum_dtype)
    return out.astype(query.dtype), jnp.where(empty, -jnp.inf, shift + jnp.log(l))[..., 0]


@jax.jit
def plain_gradients(differentiable, pairs, cotangents):
    return jax.vjp(lambda x: plain_attention(x, *pairs), differentiable)[1](cotangents)[0]


def pairs_of(call, kept=None, dropout=1.0):
    """Of every pair of query and key: whether it is kept, its distance, and dropout's factor."""
    (B, T, N, _), S = call["query"].shape, call["key"].shape[1]
    if kept is None:
        masking = {name: call[name] for name in MASKING if name in call}
        kept = kept_pairs((B, N, T, S), call.get("bias"), **masking)
    t, s = positions((B, N, T, S), call.get("query_offset", 0))
    dtype = np.result_type(call["query"].dtype, np.float32)
    return kept, abs(t - s), np.asarray(dropout, dtype)


def random_inputs(rng, B=B, T=T, S=S, N=N, K=K, H=H, Hv=Hv, dtype=np.float32):
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, Hv)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def random_cotangents(rng, call):
    """Of the output and of lse."""
    (B, T, N, _), (*_, Hv) = call["query"].shape, call["value"].shape
    dtype = call["query"].dtype
    d_out, d_lse = rng.standard_normal((B, T, N, Hv)), rng.standard_normal((B, N, T))
    return d_out.astype(dtype), d_lse.astype(np.result_type(dtype, np.float32))


def check(rng, call, kept=None, dropout=1.0):
    """Every gradient has its operand's dtype and at most 3 times the error of the plain one."""
    cotangents, pairs = random_cotangents(rng, call), pairs_of(call, kept, dropout)
    differentiable, _, _ = split(call)
    results = gradients(call, cotangents)
    plain = plain_gradients(differentiable, pairs, cotangents)
    assert_gradients(call, results, plain, cotangents, pairs)


def assert_gradients(call, results, plain, cotangents, pairs):
    kept, _, dropout = pairs
    scoring = {name: call[name] for name in SCORING if name in call}
    qkv = call["query"], call["key"], call["value"]
    offset = call.get("query_offset", 0)
    exact = attention_gradients(*qkv, *cotangents, kept, offset=offset, dropout=dropout, **scoring)
    eps = float(jnp.finfo(call["query"].dtype).eps)
    for name, x in results.items():
        assert x.dtype == call[name].dtype
        assert_gradient(name, x, plain[name], exact[name], eps)


# --- Every option


def int32(*values):
    return np.array(values, np.int32)


def floats(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def parameters(rng, N=N, dtype=np.float32):
    """Every parameter of the scores but the bias."""
    return {
        "scale": np.array(0.3, dtype),
        "logits_soft_cap": np.array(1.7, dtype),
        "alibi_slopes": rng.random(N).astype(dtype),
        "sinks": floats(rng, N, dtype=dtype),
    }


def masking_bias(rng, *shape, dtype=np.float32):
    """A tenth is -inf, and one row."""
    bias = np.where(rng.random(shape) < 0.9, rng.standard_normal(shape), -np.inf)
    bias[..., shape[-2] // 2, :] = -np.inf
    return bias.astype(dtype)


def some_mask(rng, *shape):
    """Two thirds are kept; no pair of one row and of one key."""
    mask = rng.random(shape) < 2 / 3
    mask[..., shape[-2] // 2, :] = False
    mask[..., shape[-1] // 3] = False
    return mask


def segments(rng, B=B, T=T, S=S):
    return {
        "query_segment_ids": np.sort(rng.integers(0, 4, (B, T), np.int32)),
        "key_value_segment_ids": np.sort(rng.integers(1, 5, (B, S), np.int32)),
    }


LENGTHS = {
    "query_seq_lengths": int32(7, 0),
    "key_value_seq_lengths": int32(13, S),
    "is_causal": True,
    "query_offset": int32(5, -2),
}


def everything(rng, B=B, T=T, S=S, N=N, dtype=np.float32):
    return {
        "bias": masking_bias(rng, B, 1, T, S, dtype=dtype),
        "mask": rng.random((N, T, S)) < 0.9,
        "is_causal": True,
        "local_window_size": (9, 2),
        "query_offset": rng.integers(2, 7, B, np.int32),
        "query_seq_lengths": rng.integers(T // 2, T + 1, B, np.int32),
        "key_value_seq_lengths": rng.integers(S // 2, S + 1, B, np.int32),
        "query_segment_ids": rng.integers(0, 2, (B, T), np.int32),
        "key_value_segment_ids": rng.integers(0, 2, (B, S), np.int32),
        **parameters(rng, N, dtype),
    }


def bias(*shape, dtype=np.float32):
    return lambda rng: {"bias": floats(rng, *shape, dtype=dtype)}


OPTIONS = {
    "none": lambda rng: {},
    "bias (B, N, T, S)": bias(B, N, T, S),
    "bias (1, 1, T, S)": bias(1, 1, T, S),
    "bias (1, N, 1, S)": bias(1, N, 1, S),
    "bias (B, 1, T, 1)": bias(B, 1, T, 1),
    "bias (T, S)": bias(T, S),
    "bias (S,), bfloat16": bias(S, dtype=jnp.bfloat16),
    "bias ()": bias(),
    "bias of -inf": lambda rng: {"bias": masking_bias(rng, B, N, T, S)},
    "parameters": lambda rng: parameters(rng) | {"query_offset": int32(5, -2)},
    "mask": lambda rng: {"mask": some_mask(rng, B, N, T, S)},
    "padding mask": lambda rng: {"mask": rng.random((B, 1, 1, S)) < 0.5},
    "window": lambda rng: {"local_window_size": (3, None), "query_offset": int32(7, -4)},
    "lengths and sinks": lambda rng: LENGTHS | {"sinks": floats(rng, N)},
    "segments": segments,
    "everything": everything,
}


def named(*names):
    options = {name: OPTIONS[name] for name in names} if names else OPTIONS
    return pytest.mark.parametrize("options", options.values(), ids=options)


@named()
def test_gradients_of_every_option_are_exact(options, rng):
    check(rng, random_inputs(rng) | options(rng) | {"block_sizes": TILES})


def test_gradients_of_mask_objects_are_exact(rng):
    n, offset, lengths = int32(4, 9), int32(5, -2), int32(13, 8)
    mask = (PrefixMask(n) | CausalMask(offset)) & LengthMask(None, lengths) & WindowMask(9, 8)
    t, s = np.arange(T)[:, None], np.arange(S)
    n, offset, lengths = (x[:, None, None, None] for x in (n, offset, lengths))
    kept = ((s < n) | (s <= t + offset)) & (s < lengths) & (s >= t - 9) & (s <= t + 8)
    call = random_inputs(rng) | {"mask": mask, "block_sizes": TILES}
    check(rng, call, np.broadcast_to(kept, (B, N, T, S)))


@pytest.mark.parametrize("blocks", [(8, 16), None])
def test_gradients_are_exact_with_tiles_of_any_size(blocks, rng):
    check(rng, random_inputs(rng) | everything(rng) | {"block_sizes": blocks})


@named("segments", "everything")
def test_gradients_of_bfloat16_are_exact(options, rng):
    check(rng, random_inputs(rng, dtype=jnp.bfloat16) | options(rng) | {"block_sizes": TILES})


@pytest.mark.usefixtures("x64")
def test_gradients_of_float64_are_exact(rng):
    options = everything(rng, dtype=np.float64)
    check(rng, random_inputs(rng, dtype=np.float64) | options | {"block_sizes": TILES})


@pytest.mark.parametrize(
    ("T", "S", "N", "K"),
    [(1, 67, 4, 1), (67, 1, 6, 3), (61, 67, 1, 1), (257, 131, 16, 8)],
)
def test_gradients_are_exact_for_any_lengths_and_groups(T, S, N, K, rng):
    call = random_inputs(rng, T=T, S=S, N=N, K=K)
    check(rng, call | {"is_causal": True, "query_offset": int32(S - T, S // 2)})


@pytest.mark.parametrize("sizes", [(2, 0, 5), (2, 5, 0), (0, 5, 7)])
def test_gradients_of_empty_arrays_are_zero(sizes, rng):
    call = random_inputs(rng, *sizes) | {"is_causal": True}
    for x in gradients(call, random_cotangents(rng, call)).values():
        assert not np.any(x)


def test_dropout_drops_the_same_in_both_passes(rng):
    dropout = {"dropout_rate": 0.4, "dropout_rng": jax.random.key(3), "block_sizes": TILES}
    q, k = np.zeros((B, T, N, 1), np.float32), np.zeros((B, S, 1, 1), np.float32)
    eye = np.broadcast_to(np.eye(S, dtype=np.float32)[None, :, None], (B, S, 1, S))
    factors = np.where(np.swapaxes(flash_attention(q, k, eye, **dropout), 1, 2) > 0, 1 / 0.6, 0)
    assert 0.5 < np.mean(factors > 0) < 0.7
    call = random_inputs(rng) | {"is_causal": True, "sinks": floats(rng, N)} | dropout
    check(rng, call, dropout=factors)


# --- The other functions


def heads_last(*arrays):
    return [np.swapaxes(x[None] if x.ndim == 3 else x[None, None], 1, 2) for x in arrays]


@pytest.mark.parametrize("heads", [(), (N,)])
def test_gradients_of_the_kernels_are_exact(heads, rng):
    """(T, H) of one causal head, (N, T, H) of many with groups."""
    kernel = flash_mha if heads else flash_attention_forward
    config = FlashAttentionConfig(*TILES, H, causal=not heads, softmax_scale=0.7)
    lead = (K,) if heads else ()
    shapes = (*heads, T, H), (*lead, S, H), (*lead, S, Hv), (*heads, T, Hv)
    q, k, v, d_out = (floats(rng, *shape) for shape in shapes)
    pull = jax.jit(lambda qkv, d_out: jax.vjp(functools.partial(kernel, config), *qkv)[1](d_out))
    results = heads_last(*pull((q, k, v), d_out))
    names = "query", "key", "value"
    inputs = dict(zip(names, heads_last(q, k, v), strict=True))
    call = inputs | {"scale": np.float32(0.7), "is_causal": not heads}
    assert_exact_without_lse(call, dict(zip(names, results, strict=True)), heads_last(d_out)[0])


def assert_exact_without_lse(call, results, d_out):
    pairs, (_, T, N, _) = pairs_of(call), call["query"].shape
    cotangents = d_out, np.zeros((len(d_out), N, T), np.float32)
    plain = plain_gradients(split(call)[0], pairs, cotangents)
    assert_gradients(call, results, plain, cotangents, pairs)


def test_gradients_of_dot_product_attention_are_exact_and_its_residual_has_none(rng):
    call = random_inputs(rng) | {"bias": floats(rng, 1, N, T, S), "scale": np.float32(0.4)}
    options = {"is_causal": True, "local_window_size": (3, 0), "query_seq_lengths": int32(T, 4)}
    d_out, _ = random_cotangents(rng, call)

    @jax.jit
    def pull(differentiable, cotangents):
        attend = functools.partial(dot_product_attention, **options, return_residual=True)
        return jax.vjp(lambda x: attend(**x), differentiable)[1](cotangents)[0]

    results = pull(call, (d_out, np.full((B, T, N), 1e3, np.float32)))
    assert_exact_without_lse(call | options, results, d_out)


# --- Random combinations


@st.composite
def random_calls(draw):
    """Of few programs, each of which takes all traced options, and a seed for their values."""
    sizes = draw(st.sampled_from([(2, 7, 13, 6, 3), (1, 17, 11, 4, 1)]))
    static = draw(
        st.sampled_from(
            [
                {"is_causal": True, "block_sizes": (8, 16)},
                {"local_window_size": (4, None), "block_sizes": TILES},
            ]
        )
    )
    bits = st.lists(st.booleans(), min_size=4, max_size=4)
    return sizes, static, draw(bits), draw(st.integers(0, 2**32 - 1))


@hypothesis.settings(derandomize=True, deadline=None, max_examples=16, database=None)
@hypothesis.given(random_calls())
def test_gradients_of_any_options_together_are_exact(drawn):
    (B, T, S, N, K), static, (biased, lengths, packed, masked), seed = drawn
    rng = np.random.default_rng(seed)
    traced = {
        "bias": (masking_bias if biased else floats)(rng, B, 1, T, S),
        "mask": some_mask(rng, N, T, S) if masked else np.full((N, T, S), True),
        "query_seq_lengths": rng.integers(0, T + 1, B, np.int32) if lengths else int32(*[T] * B),
        "key_value_seq_lengths": rng.integers(0, S + 1, B, np.int32),
        "query_offset": rng.integers(-T, S + 3, B, np.int32),
        "scale": np.float32(rng.normal()),
        "logits_soft_cap": np.float32(rng.uniform(0.5, 9)),
        "sinks": floats(rng, N),
        "alibi_slopes": rng.random(N).astype(np.float32),
        **segments(rng, B, T, S),
    }
    if not packed:
        traced |= {name: np.zeros_like(traced[name]) for name in segments(rng, B, T, S)}
    check(rng, random_inputs(rng, B, T, S, N, K) | traced | static)


# --- Forward mode, and forward over reverse


def weighed(function, weights):
    """The scalar sum of a function's results times weights."""
    return lambda x: sum(jnp.vdot(w, y) for w, y in zip(weights, function(x), strict=True))


@pytest.fixture
def small_call(rng):
    """Every parameter, causal, windowed and with lengths; every row reads a key. Float64."""
    sizes, dtype = {"B": 2, "T": 5, "S": 7, "N": 2}, np.float64
    return random_inputs(rng, **sizes, K=1, H=3, Hv=2, dtype=dtype) | {
        "bias": floats(rng, 1, 2, 5, 7, dtype=dtype),
        "is_causal": True,
        "local_window_size": (4, 2),
        "query_offset": int32(1, 2),
        "key_value_seq_lengths": int32(7, 4),
        "block_sizes": (2, 3),
        **parameters(rng, 2, dtype),
    }


@pytest.mark.usefixtures("x64")
def test_derivatives_are_the_limits_of_differences(small_call, rng):
    differentiable, arrays, static = split(small_call)

    @jax.jit
    def attend(x):
        return flash_attention_with_lse(**x, **arrays, **dict(static))

    check_grads(attend, (differentiable,), order=1, modes=("fwd", "rev"))
    weights = random_cotangents(rng, small_call)
    gradient = jax.jit(jax.grad(weighed(attend, weights)))
    check_grads(gradient, (differentiable,), order=1, modes=("fwd",))


def jvp(f, x, dx, weights):
    return jax.jvp(f, (x,), (dx,))[1]


def linearize(f, x, dx, weights):
    return jax.linearize(f, x)[1](dx)


def jacfwd(f, x, dx, weights):
    small = {name: x[name] for name in SCORING if name != "bias"}
    return jax.jacfwd(lambda small: f(x | small))(small)


def jacrev(f, x, dx, weights):
    """Several reverse passes at once, over operands that they share."""
    return jax.jacrev(lambda x: f(x)[0][0, -1, 1])(x)


def hessian_vector_product(f, x, dx, weights):
    return jax.jvp(jax.grad(weighed(f, weights)), (x,), (dx,))[1]


@pytest.mark.parametrize(
    ("transform", "dtype"),
    [
        (jvp, np.float64),
        (linearize, np.float64),
        (jacfwd, np.float64),
        (jacrev, np.float64),
        (hessian_vector_product, np.float64),
    ],
)
@pytest.mark.usefixtures("x64")
def test_forward_mode_agrees_with_the_plain_formula(transform, dtype, small_call, rng):
    x, arrays, static = split(small_call)
    dx = {name: np.asarray(rng.standard_normal(np.shape(y))) for name, y in x.items()}
    weights, pairs = random_cotangents(rng, small_call), pairs_of(small_call)

    def flash(x):
        return flash_attention_with_lse(**x, **arrays, **dict(static))

    def plain(x):
        return plain_attention(x, pairs[0], pairs[1], pairs[2].astype(x["query"].dtype))

    def of(f, dtype):
        cast = jax.tree.map(lambda y: y.astype(dtype), (x, dx, weights))
        return jax.jit(functools.partial(transform, f))(*cast)

    exact, near, results = of(plain, np.float64), of(plain, dtype), of(flash, dtype)
    for x, y, right in zip(*map(jax.tree.leaves, (results, near, exact)), strict=True):
        assert x.dtype == dtype
        size = max(1, np.max(abs(right)))
        bound = 3 * np.max(abs(y - right)) + 32 * jnp.finfo(dtype).eps * size
        assert np.max(abs(x - right)) <= bound


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["none", "causal"])
def test_a_second_reverse_pass_is_refused(options, rng):
    """It would have to hold every tile's scores: the way to second derivatives is jvp of grad."""
    x = random_inputs(rng)
    loss = lambda q: jnp.sum(flash_attention(q, x["key"], x["value"], **options) ** 2)  # noqa: E731
    twice = jax.grad(lambda q: jnp.sum(jax.grad(loss)(q) ** 2))
    with pytest.raises((ValueError, NotImplementedError), match=r"[Rr]everse"):
        jax.make_jaxpr(twice)(x["query"])


# --- What is masked has no gradient and cannot leak


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_what_is_read_by_none_or_reads_nothing_has_zero_gradients(sinks, rng):
    call = random_inputs(rng) | LENGTHS | parameters(rng) | {"block_sizes": TILES}
    call |= {"bias": floats(rng, B, N, T, S)}
    if not sinks:
        del call["sinks"]
    found = gradients(call, random_cotangents(rng, call))
    kept, _, _ = pairs_of(call)
    reads, read = kept.any(axis=(1, 3)), kept.any(axis=(1, 2))
    assert not reads.all()
    assert not read.all()
    for name, seen in {"query": reads, "key": read, "value": read, "bias": kept}.items():
        x = np.asarray(found[name])
        assert not x[~seen].any()
        assert x[seen].any()


# Without sinks lse of a row that reads nothing is -inf, and its cotangent is padding, too.
HIDING = {
    "mask": (lambda rng: {"mask": some_mask(rng, B, 1, T, S)}, True),
    "bias": (lambda rng: {"bias": masking_bias(rng, B, 1, T, S)}, True),
    "lengths": (lambda rng: LENGTHS, False),
    "lengths and sinks": (lambda rng: LENGTHS, True),
    "segments": (segments, False),
}


def hiding_call(rng, name):
    options, sinks = HIDING[name]
    call = random_inputs(rng) | parameters(rng) | {"block_sizes": TILES, **options(rng)}
    if not sinks:
        del call["sinks"]
    return {"bias": floats(rng, B, 1, T, S)} | call


def poisoned(call, cotangents, poison):
    """call and cotangents with poison in all that no pair that is kept has."""
    kept, _, _ = pairs_of(call)
    reads, read = kept.any(axis=(1, 3)), kept.any(axis=(1, 2))
    worse = {name: call[name].copy() for name in ("query", "key", "value", "bias")}
    worse["query"][~reads] = worse["key"][~read] = worse["value"][~read] = poison
    worse["bias"][~kept.any(axis=1, keepdims=True) & ~np.isneginf(call["bias"])] = poison
    d_out, d_lse = (x.copy() for x in cotangents)
    d_out[~reads] = poison
    if "sinks" not in call:
        np.swapaxes(d_lse, 1, 2)[~reads] = poison
    assert not reads.all()
    return call | worse, (d_out, d_lse)


@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_nothing_behind_a_mask_reaches_a_gradient(name, poison, rng):
    call = hiding_call(rng, name)
    cotangents = random_cotangents(rng, call)
    before = gradients(call, cotangents)
    after = gradients(*poisoned(call, cotangents, poison))
    for operand, x in before.items():
        np.testing.assert_array_equal(after[operand], x, err_msg=operand)


@pytest.mark.parametrize("transform", [jvp, hessian_vector_product])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
def test_nothing_behind_a_mask_reaches_a_tangent(transform, poison, rng):
    call = hiding_call(rng, "lengths and sinks")
    weights = random_cotangents(rng, call)
    x, arrays, static = split(call)
    dx = {name: np.asarray(rng.standard_normal(y.shape), np.float32) for name, y in x.items()}
    worse, worse_weights = poisoned(call, weights, poison)
    worse_dx, _ = poisoned(call | dx, weights, poison)
    run = hidden_tangents(transform, tuple(arrays), static)
    before = run(x, dx, weights, *arrays.values())
    worse, worse_dx = ({name: y[name] for name in x} for y in (worse, worse_dx))
    after = run(worse, worse_dx, worse_weights, *arrays.values())
    for y, right in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(y, right)


@functools.cache
def hidden_tangents(transform, names, static):
    @jax.jit
    def run(x, dx, weights, *arrays):
        options = dict(zip(names, arrays, strict=True)) | dict(static)
        return transform(lambda x: flash_attention_with_lse(**x, **options), x, dx, weights)

    return run


def test_gradients_run_where_jax_checks_for_nan(rng):
    call = random_inputs(rng) | LENGTHS | parameters(rng) | {"bias": masking_bias(rng, B, 1, T, S)}
    differentiable, arrays, static = split(call)

    def loss(x):
        return jnp.sum(flash_attention(**x, **arrays, **dict(static)) ** 2)

    with jax.debug_nans(True), jax.numpy_dtype_promotion("strict"):
        for name, x in jax.jit(jax.grad(loss))(differentiable).items():
            assert np.any(x), name


@pytest.mark.parametrize("magnitude", [1e4, 1e10])
@pytest.mark.parametrize("options", ["scale", "soft cap", "alibi", "bias"])
def test_huge_logits_have_finite_gradients_and_probabilities_of_sum_one(options, magnitude, rng):
    T, S, H = 37, 53, 24
    extra = {
        "scale": {"scale": np.float32(magnitude)},
        "soft cap": {"scale": np.float32(magnitude), "logits_soft_cap": np.float32(3 * magnitude)},
        "alibi": {"alibi_slopes": np.full(N, magnitude, np.float32), "query_offset": 3},
        "bias": {"bias": np.float32(magnitude) * floats(rng, N, 1, S)},
    }[options]
    call = random_inputs(rng, T=T, S=S, H=H) | extra | {"block_sizes": (16, 24)}
    d_out, d_lse = random_cotangents(rng, call)
    found = gradients(call, (d_out, d_lse))
    for name, x in found.items():
        assert np.isfinite(x).all(), name
    # As every query's probabilities have sum 1, values get just what the outputs have.
    given = d_out.astype(np.float64).reshape(B, T, K, N // K, Hv).sum(axis=(1, 3))
    np.testing.assert_allclose(np.sum(found["value"], axis=1), given, rtol=0, atol=1e-4)


# --- Transformations


def test_integers_have_float0_tangents(rng):
    x = random_inputs(rng)
    attend = lambda q, n: flash_attention(q, x["key"], x["value"], query_seq_lengths=n)  # noqa: E731
    out, pull = jax.vjp(attend, x["query"], int32(7, 3))
    _, of_lengths = pull(out)
    assert of_lengths.dtype == jax.dtypes.float0


def attend_in_vmap(x):
    """Of one element of a batch, with whatever options are given."""
    return flash_attention_with_lse(**x, is_causal=True, block_sizes=TILES)


def loss_of_call(x, weights):
    out, lse = attend_in_vmap(x)
    return jnp.vdot(out, weights[0]) + jnp.vdot(jnp.where(jnp.isneginf(lse), 0, lse), weights[1])


def gradient_of_call(x, weights):
    differentiable, arrays, _ = split(x)
    return jax.grad(lambda y: loss_of_call(y | arrays, weights))(differentiable)


@pytest.fixture
def vmapped(rng):
    """Four calls stacked, without the axis B, and their weights."""
    call = random_inputs(rng, B=4) | {
        "bias": floats(rng, 4, N, 1, S),
        "mask": some_mask(rng, 4, 1, T, S),
        "key_value_seq_lengths": int32(S, 0, 3, 11),
        "query_offset": int32(6, 2, 0, -3),
        "scale": floats(rng, 4),
        "sinks": floats(rng, 4, N),
    }
    weights = floats(rng, 4, T, N, Hv), floats(rng, 4, N, T)
    return call, weights


SHARED = [
    ("key", "value"),
    ("query", "bias", "mask"),
    ("key", "key_value_seq_lengths", "sinks"),
]


@pytest.mark.parametrize("shared", SHARED, ids=" ".join)
def test_gradients_and_vmap_commute(shared, vmapped):
    calls, weights = vmapped
    x = {name: y[1] if name in shared else y for name, y in calls.items()}
    axes = {name: None if name in shared else 0 for name in x}
    one = jax.jit(gradient_of_call)
    loop = [
        one({name: y if name in shared else y[i] for name, y in x.items()}, [w[i] for w in weights])
        for i in range(4)
    ]
    of_each = jax.jit(jax.vmap(gradient_of_call, in_axes=(axes, 0)))(x, weights)
    differentiable, arrays, _ = split(x)

    @jax.jit
    def of_all(differentiable):
        losses = jax.vmap(loss_of_call, in_axes=(axes, 0))
        return jax.grad(lambda y: jnp.sum(losses(y | arrays, weights)))(differentiable)

    for name, total in of_all(differentiable).items():
        expected = np.stack([y[name] for y in loop])
        size = max(1, np.max(abs(expected)))
        np.testing.assert_allclose(of_each[name], expected, rtol=0, atol=2e-6 * size)
        if name in shared:
            expected = expected.sum(axis=0)
        np.testing.assert_allclose(total, expected, rtol=0, atol=1e-5 * size)


def test_nested_vmaps_of_gradients_are_loops(vmapped):
    calls, weights = vmapped
    x = {name: y if name in ("query", "sinks") else y[:2] for name, y in calls.items()}
    x["value"], x["scale"] = x["value"][0], x["scale"][0]
    outer = {name: 0 if name in ("query", "sinks") else None for name in x}
    inner = {name: None if name in ("query", "sinks", "value", "scale") else 0 for name in x}
    weights = [w[0] for w in weights]
    nested = jax.vmap(jax.vmap(gradient_of_call, in_axes=(inner, None)), in_axes=(outer, None))
    results, one = jax.jit(nested)(x, weights), jax.jit(gradient_of_call)
    for i, j in np.ndindex(4, 2):
        at = {
            name: y[i] if outer[name] == 0 else y if inner[name] is None else y[j]
            for name, y in x.items()
        }
        for name, y in one(at, weights).items():
            size = max(1, np.max(abs(y)))
            np.testing.assert_allclose(results[name][i, j], y, rtol=0, atol=2e-6 * size)


def test_gradients_through_a_scan_over_checkpointed_layers(rng):
    x, w = floats(rng, B, T, N, H), floats(rng, 3, H, H) / H
    lengths = int32(9, 4)
    call = {"query": x, "key": x, "is_causal": True, "key_value_seq_lengths": lengths}
    kept, distance, one = pairs_of(call)
    attend = functools.partial(flash_attention, is_causal=True, key_value_seq_lengths=lengths)

    def plain(q, k, v):
        return plain_attention({"query": q, "key": k, "value": v}, kept, distance, one)[0]

    def loss(x, w, attend, remat, scan):
        layer = remat(lambda x, w: (x + attend(x @ w, x, jnp.sin(x)), None))
        return jnp.sum(scan(layer, x, w)[0] ** 3)

    def unrolled(layer, x, w):
        for each in w:
            x, _ = layer(x, each)
        return x, None

    found = jax.jit(jax.grad(lambda x, w: loss(x, w, attend, jax.checkpoint, lax.scan), (0, 1)))(
        x, w
    )
    right = jax.jit(jax.grad(lambda x, w: loss(x, w, plain, lambda f: f, unrolled), (0, 1)))(x, w)
    for y, expected in zip(found, right, strict=True):
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.max(abs(expected)))


@pytest.fixture
def exact_case(rng):
    """A function of query, key, value and lengths that gives gradients, and its arguments."""

    def gradient(q, k, v, lengths):
        attend = functools.partial(flash_attention, key_value_seq_lengths=lengths, is_causal=True)
        return jax.grad(lambda *qkv: jnp.sum(attend(*qkv) ** 2), argnums=(0, 1, 2))(q, k, v)

    return gradient, (*random_inputs(rng).values(), int32(3, 15))


def test_an_exported_gradient_takes_other_lengths(exact_case):
    gradient, (*qkv, lengths) = exact_case
    exported = export.export(jax.jit(gradient))(*qkv, lengths)
    reloaded = export.deserialize(exported.serialize())
    for n in (lengths, int32(0, S)):
        for x, y in zip(reloaded.call(*qkv, n), jax.jit(gradient)(*qkv, n), strict=True):
            np.testing.assert_array_equal(x, y)


def test_gradients_can_take_the_memory_of_donated_operands(exact_case):
    gradient, (*qkv, lengths) = exact_case
    expected = jax.jit(gradient)(*qkv, lengths)
    donated = [jnp.array(x) for x in qkv]
    found = jax.jit(gradient, donate_argnums=(0, 1, 2))(*donated, lengths)
    for x, y, gone in zip(found, expected, donated, strict=True):
        np.testing.assert_array_equal(x, y)
        assert gone.is_deleted()


def test_gradients_are_the_same_bits_every_time(rng):
    call = random_inputs(rng, T=257, S=263) | {"is_causal": True} | parameters(rng)
    cotangents = random_cotangents(rng, call)
    first = gradients(call, cotangents)
    for _ in range(3):
        for name, x in gradients(call, cotangents).items():
            np.testing.assert_array_equal(x, first[name])


# --- Memory: temporary bytes as XLA plans them, of programs that are only compiled


def spec(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def ids(*shape):
    return spec(*shape, dtype=np.int32)


def temporary_bytes(T, options, transform=lambda loss: jax.grad(loss), N=2, H=16):
    x = dict.fromkeys(("query", "key", "value"), spec(1, T, N, H)) | options
    differentiable, arrays, static = split(x)

    def run(x, arrays):
        loss = lambda x: jnp.sum(flash_attention(**x, **arrays, **dict(static)))  # noqa: E731
        return transform(loss)(x)

    memory = jax.jit(run).lower(differentiable, arrays).compile().memory_analysis()
    return memory.temp_size_in_bytes


def with_parameters(T):
    names = "alibi_slopes", "sinks"
    return {"scale": spec(), "logits_soft_cap": spec()} | dict.fromkeys(names, spec(2))


LINEAR = {
    "none": lambda T: {},
    "parameters and dropout": lambda T: (
        with_parameters(T) | {"dropout_rate": 0.1, "dropout_rng": spec(2, dtype=np.uint32)}
    ),
    "masks": lambda T: {
        "is_causal": True,
        "query_offset": ids(1),
        "local_window_size": (None, 700),
        "query_seq_lengths": ids(1),
        "key_value_seq_lengths": ids(1),
        "query_segment_ids": ids(1, T),
        "key_value_segment_ids": ids(1, T),
        "mask": PrefixMask(ids(1)) | CausalMask(ids()),
    },
    "bias of keys": lambda T: {"bias": spec(1, 2, 1, T), "mask": spec(1, 1, 1, T, dtype=bool)},
}


def hvp(loss):
    return lambda x: jax.jvp(jax.grad(loss), (x,), (x,))[1]


@pytest.mark.parametrize(
    ("options", "transform"),
    [*((name, jax.grad) for name in LINEAR), ("parameters and dropout", hvp)],
)
def test_memory_of_derivatives_is_linear(options, transform):
    small, large = (temporary_bytes(T, LINEAR[options](T), transform) for T in (4096, 16384))
    assert large <= 2.2**2 * small
    assert large < 16384**2  # one byte per pair


def test_a_full_bias_costs_its_own_size_once():
    T = 4096
    without = temporary_bytes(T, {"bias": spec(1, 1, 1, T)})
    assert temporary_bytes(T, {"bias": spec(1, 1, T, T)}) <= 1.05 * 4 * T**2 + without


def test_the_gradient_of_65536_positions_fits_in_512_mib():
    assert temporary_bytes(65536, {"is_causal": True}, N=1, H=64) < 512 * 2**20
