"""What JAX makes of a call: the same program in every process, and each pass once."""

import collections
import os
import re

import jax
import lowered
import numpy as np
import pytest
from jax import numpy as jnp
from jax.experimental import checkify, jet
from paths import PATHS, derivatives
from processes import run_script

from flash_jax import (
    CausalMask,
    FlashAttentionConfig,
    LengthMask,
    WindowMask,
    block_schedule,
    dequantize,
    dot_product_attention,
    flash_attention,
    flash_attention_forward_i8,
    flash_attention_int8,
    flash_attention_with_lse,
    merge_attention,
    quantize,
    reference_attention,
)

SIZES = {"B": 2, "T": 7, "S": 11, "N": 4, "K": 2, "H": 3}
FUNCTIONS = pytest.mark.parametrize("attend", [flash_attention, flash_attention_int8])


def test_a_program_does_not_depend_on_the_hash_seed(capsys):
    """Else JAX's compilation cache misses, and the hosts of a job compile different programs."""
    lowered.main()
    here = capsys.readouterr().out
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    assert len(here.splitlines()) == len(lowered.NAMES) + 1
    assert run_script("lowered.py", PYTHONHASHSEED=seed) == here


# The kernel on int8 is below; its derivatives are made as those of INT8.
EAGER = "Mask", "parameters", "dropout", "INT8"


@pytest.mark.parametrize("name", EAGER)
def test_disable_jit_changes_no_result(name, rng):
    path = PATHS[name]
    x = path.arrays(rng, **SIZES)
    shapes = jax.eval_shape(path.call, x)
    weights = jax.tree.map(lambda y: np.asarray(rng.standard_normal(y.shape), y.dtype), shapes)
    expected = jax.jit(lambda x, weights: derivatives(path, x, weights))(x, weights)
    with jax.disable_jit():
        found = derivatives(path, x, weights)
    for y, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = max(1, np.max(np.abs(right), initial=0))
        np.testing.assert_allclose(y, right, rtol=0, atol=1e-6 * size)


def test_disable_jit_changes_no_other_function(rng):
    x = rng.standard_normal((7, 4, 3)).astype(np.float32)
    config = FlashAttentionConfig(5, 3, 3, causal=True)
    integers = np.round(20 * x).astype(np.int8)
    parts = flash_attention_with_lse(x, x, x, query_offset=1, is_causal=True)
    calls = {
        "flash_attention_forward_i8": lambda: flash_attention_forward_i8(
            config, *[integers[:, 0]] * 3, 0.05, np.float32(0.05), 1
        ),
        "flash_attention_int8 on a cache": lambda: flash_attention_int8(
            x, quantize(x), quantize(x)
        ),
        "dot_product_attention": lambda: dot_product_attention(x, x, x, return_residual=True),
        "merge_attention": lambda: merge_attention([parts[0]] * 2, [parts[1]] * 2),
        "dequantize": lambda: dequantize(quantize(x, (2, None, 1))),
        "reference_attention": lambda: reference_attention(x, x, x, is_causal=True),
        "to_array": lambda: (WindowMask(1, 0) | LengthMask(kv=2)).to_array(5, 7),
        "block_schedule": lambda: block_schedule(CausalMask(), 7, 5, (3, 2)).tiles,
    }
    for name, call in calls.items():
        expected = jax.tree.leaves(call())
        with jax.disable_jit():
            found = jax.tree.leaves(call())
        for y, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(y, right, rtol=0, atol=1e-6, err_msg=name)


def passes(function, *arguments):
    """How often each primitive of attention stands in a function's program."""
    names = re.findall(r"\bflash_(\w+)\[", str(jax.make_jaxpr(function)(*arguments)))
    return dict(collections.Counter(names))


@FUNCTIONS
def test_a_policy_of_checkpoint_runs_attention_once(attend, rng):
    """INT8 has two forward passes: of the integers, and of the floats that they stand for."""
    x, w = rng.standard_normal((2, 7, 4, 3)).astype(np.float32), np.eye(3, dtype=np.float32)
    policy = jax.checkpoint_policies.save_only_these_names("flash_attention")
    saved, forgotten = (
        jax.grad(lambda w, layer=layer: jnp.sum(layer(x, w) ** 2))
        for layer in (
            jax.checkpoint(lambda x, w: attend(x @ w, x, x) @ w, policy=policy),
            jax.checkpoint(lambda x, w: attend(x @ w, x, x) @ w),
        )
    )
    once = 1 if attend is flash_attention else 2
    assert passes(saved, w) == {"attention": once, "gradient": 1}
    assert passes(forgotten, w) == {"attention": once + 1, "gradient": 1}
    np.testing.assert_allclose(saved(w), forgotten(w), rtol=0, atol=1e-6)


def test_an_offloading_policy_takes_the_name(rng):
    x = rng.standard_normal((2, 7, 4, 3)).astype(np.float32)
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["flash_attention"],
        names_which_can_be_offloaded=[],
        offload_src="device",
        offload_dst="pinned_host",
    )
    layer = jax.checkpoint(lambda x: flash_attention(x, x, x), policy=policy)
    found = passes(jax.grad(lambda x: jnp.sum(layer(x) ** 2)), x)
    assert found == {"attention": 1, "gradient": 1}


# A NaN that arises inside: infinite scores of finite inputs. One that an input has shows, too.
@FUNCTIONS
@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["forward", "gradient"])
def test_checkify_reports_nan(attend, transform):
    x = jnp.ones((1, 4, 2, 8))

    def loss(q, k):
        return jnp.sum(attend(q, k, x, is_causal=True))

    checked = checkify.checkify(jax.jit(transform(loss)), errors=checkify.float_checks)
    for poison in (jnp.inf, jnp.nan):
        error, _ = checked(x * poison, x)
        assert "nan generated by primitive" in str(error.get())
    error, _ = checked(x, x)
    assert error.get() is None


def test_checkify_reports_an_overflow_inside():
    x = jnp.ones((1, 4, 2, 8))
    checked = checkify.checkify(flash_attention, errors=checkify.float_checks)
    error, _ = checked(x * 1e30, x * 1e30, x)
    assert "nan generated by primitive: flash_attention" in str(error.get())


@FUNCTIONS
def test_jet_is_refused_by_name(attend):
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(NotImplementedError, match=r"no Taylor series.*nest jax\.jvp"):
        jet.jet(lambda q: attend(q, x, x), (x,), ((x, x),))
