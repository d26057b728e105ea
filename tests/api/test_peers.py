"""Agreement with jax.nn and PyTorch on all that they share."""

import functools
import inspect

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from oracle import assert_within_bound, attention

import flash_jax

B, T, S, N, K, H = 2, 11, 17, 6, 3, 5


def inputs(rng, dtype=np.float32, lead=(B,)):
    shapes = (*lead, T, N, H), (*lead, S, K, H), (*lead, S, K, H)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def mask(rng, *shape):
    """Every row keeps the first key: jax.nn gives the mean of the values where none is kept."""
    kept = rng.random(shape) < 0.6
    kept[..., 0] = True
    return kept


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def int32(*values):
    return np.array(values, np.int32)


def assert_agrees(results, peers, tolerance=3e-6):
    for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(peers), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=tolerance, atol=tolerance
        )


# --- jax.nn

SHARED = {
    "nothing": lambda rng: {},
    "bias of rank 1": lambda rng: {"bias": normal(rng, S), "mask": mask(rng, N, 1, S)},
    "bias of rank 3": lambda rng: {"bias": normal(rng, N, T, 1), "mask": mask(rng, T, S)},
    "scale": lambda rng: {"scale": 0.3},
    "traced scale": lambda rng: {"scale": jnp.float32(0.3)},
    "lengths of keys": lambda rng: {"key_value_seq_lengths": int32(5, 17)},
    "window (left, right)": lambda rng: {"local_window_size": (2, 7)},
    "causal window": lambda rng: {"local_window_size": 4, "is_causal": True},
    "implementation": lambda rng: {"implementation": "xla"},
    "all": lambda rng: {
        "bias": normal(rng, B, N, T, S),
        "mask": mask(rng, B, 1, T, S),
        "scale": 0.3,
        "is_causal": True,
        "key_value_seq_lengths": int32(5, 17),
        "local_window_size": (11, 2),
        "implementation": None,
    },
}
shared = pytest.mark.parametrize("options", SHARED.values(), ids=SHARED)


@shared
def test_dot_product_attention_agrees_with_jax_nn(options, rng):
    options = options(rng)
    x = inputs(rng)
    assert_agrees(
        flash_jax.dot_product_attention(*x, **options, return_residual=True),
        jax.nn.dot_product_attention(*x, **options, return_residual=True),
    )


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2.0**-7), (np.float16, 2.0**-10)])
def test_dot_product_attention_agrees_with_jax_nn_in_16_bits(options, dtype, tolerance, rng):
    x = inputs(rng, dtype)
    assert_agrees(
        flash_jax.dot_product_attention(*x, **options, return_residual=True),
        jax.nn.dot_product_attention(*x, **options, return_residual=True),
        tolerance,
    )


def test_query_lengths_give_zero_rows_as_in_jax_nn(rng):
    """Only the residual of a row without keys differs: -inf here, a huge negative number there."""
    x, lengths = inputs(rng), int32(7, 0)
    call = {"query_seq_lengths": lengths, "return_residual": True}
    out, residual = flash_jax.dot_product_attention(*x, **call)
    peer, peer_residual = jax.nn.dot_product_attention(*x, **call)
    assert_agrees(out, peer)
    exists = np.arange(T) < lengths[:, None]
    assert_agrees(residual[exists], peer_residual[exists])
    assert np.isneginf(residual[~exists]).all()


UNBATCHED = {
    "lengths": {"query_seq_lengths": int32(7), "key_value_seq_lengths": int32(5)},
    "mask": {"mask": np.tri(T, S, 6, dtype=bool)},
    "bias": {"bias": np.arange(N * S, dtype=np.float32).reshape(N, 1, S) % 7},
    "mask of 4 axes": {"mask": np.tri(T, S, 6, dtype=bool)[None, None]},
}


@pytest.mark.parametrize("options", UNBATCHED.values(), ids=UNBATCHED)
def test_calls_without_batch_agree_with_jax_nn(options, rng):
    x = inputs(rng, lead=())
    assert_agrees(
        flash_jax.dot_product_attention(*x, **options),
        jax.nn.dot_product_attention(*x, **options),
    )
    rows = slice(0, 7)
    results, peers = (
        attend(*x, **options, return_residual=True)[1][rows]
        for attend in (flash_jax.dot_product_attention, jax.nn.dot_product_attention)
    )
    assert_agrees(results, peers)


def test_the_residual_has_no_gradient_as_in_jax_nn(rng):
    x = inputs(rng, jnp.bfloat16)

    def total(attend, query):
        return attend(query, *x[1:], return_residual=True)[1].sum()

    for attend in (flash_jax.dot_product_attention, jax.nn.dot_product_attention):
        np.testing.assert_array_equal(jax.grad(functools.partial(total, attend))(x[0]), 0)


def test_the_signature_is_that_of_jax_nn_and_empty_rows():
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (flash_jax.dot_product_attention, jax.nn.dot_product_attention)
    )
    assert ours == [*theirs, ("empty_rows", inspect.Parameter.KEYWORD_ONLY, "zero")]


def layer(x, weights, mask):
    """A model's attention layer, which knows jax.nn only."""
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in weights)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True).sum(axis=(2, 3))


def test_code_that_calls_jax_nn_agrees_after_the_swap(rng, monkeypatch):
    x, kept = normal(rng, B, T, 8), mask(rng, B, 1, T, T)
    weights = [normal(rng, 8, heads, H) / 4 for heads in (N, K, K)]
    before = jax.jit(layer)(x, weights, kept)
    calls = []

    def swapped(*args, **options):
        calls.append(options)
        return flash_jax.dot_product_attention(*args, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", swapped)
    after = jax.jit(lambda *args: layer(*args))(x, weights, kept)
    assert len(calls) == 1
    assert_agrees(after, before, 2e-5)


@pytest.mark.parametrize(
    ("implementation", "error"), [("cudnn", NotImplementedError), ("flash", ValueError)]
)
def test_other_implementations_are_refused(implementation, error, rng):
    with pytest.raises(
        error, match=f"implementation must be None or 'xla'; it is '{implementation}'"
    ):
        flash_jax.dot_product_attention(*inputs(rng), implementation=implementation)


# --- PyTorch


@pytest.fixture
def sdpa():
    """scaled_dot_product_attention of arrays laid out as ours, through float32."""
    torch = pytest.importorskip("torch", reason="torch is in the extra `bench`, of Python 3.11")

    def call(query, key, value, dtype=np.float32, **options):
        kind = {np.float32: torch.float32, jnp.bfloat16: torch.bfloat16}[dtype]
        tensors = [
            torch.from_numpy(np.asarray(x, np.float32)).transpose(1, 2).to(kind)
            for x in (query, key, value)
        ]
        if "attn_mask" in options:
            options["attn_mask"] = torch.from_numpy(options["attn_mask"])
        out = torch.nn.functional.scaled_dot_product_attention(
            *tensors, **options, enable_gqa=query.shape[2] != key.shape[2]
        )
        return out.transpose(1, 2).float().numpy().astype(dtype)

    return call


TORCH = {
    "nothing": lambda rng: ({}, {}),
    "scale": lambda rng: ({"scale": 0.3}, {"scale": 0.3}),
    "mask": lambda rng: both("mask", mask(rng, B, N, T, S)),
    "mask (T, S)": lambda rng: both("mask", mask(rng, T, S)),
    "bias": lambda rng: both("bias", normal(rng, B, N, T, S)),
    "bias of -inf": lambda rng: both(
        "bias", np.where(mask(rng, B, 1, T, S), normal(rng, S), -np.inf).astype(np.float32)
    ),
}


def both(name, array):
    return {name: array}, {"attn_mask": array}


@pytest.mark.parametrize("options", TORCH.values(), ids=TORCH)
def test_flash_attention_agrees_with_torch(options, sdpa, rng):
    ours, theirs = options(rng)
    x = inputs(rng)
    assert_agrees(flash_jax.flash_attention(*x, **ours), sdpa(*x, **theirs))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_square_causal_attention_is_within_the_bound_of_torch(dtype, sdpa, rng):
    q, k, v = inputs(rng, dtype)
    k, v = k[:, :T], v[:, :T]
    out, lse = flash_jax.flash_attention_with_lse(q, k, v, is_causal=True)
    exact = attention(q, k, v, is_causal=True)
    peer = sdpa(q, k, v, dtype, is_causal=True)
    plain_lse = attention(q, k, v, is_causal=True, dtype=dtype)[1]
    assert_within_bound((out, lse), exact, (peer, plain_lse), dtype)
