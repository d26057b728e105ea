"""Signatures: options are written once, and each function that has them shows and checks them."""

import inspect

import jax
import pytest
from jax import numpy as jnp

import flash_jax
from flash_jax import flash_attention, flash_attention_int8

PAIRS = ["flash_attention", "flash_attention_int8"]
POSITIONAL = ["query", "key", "value", "bias", "mask"]
OF_DROPOUT = ["dropout_rate", "dropout_rng", "broadcast_dropout"]


def parameters(function):
    return list(inspect.signature(function).parameters.values())


def names(function):
    return [x.name for x in parameters(function)]


@pytest.mark.parametrize("name", PAIRS)
def test_with_and_without_lse_have_the_same_parameters(name):
    plain, with_lse = getattr(flash_jax, name), getattr(flash_jax, f"{name}_with_lse")
    assert parameters(plain) == parameters(with_lse)  # names, kinds, defaults and annotations
    assert inspect.signature(plain).return_annotation == "Array"
    assert inspect.signature(with_lse).return_annotation == "tuple[Array, Array]"
    assert plain.__annotations__ == {**with_lse.__annotations__, "return": "Array"}
    assert plain.__name__ == plain.__qualname__ == name
    assert plain.__module__ == with_lse.__module__


@pytest.mark.parametrize("name", PAIRS)
def test_options_are_keywords_with_defaults(name):
    found = parameters(getattr(flash_jax, name))
    inputs, optional = found[:3], found[3:]
    assert [x.name for x in found if x.kind is x.POSITIONAL_OR_KEYWORD] == POSITIONAL
    assert [x.name for x in found if x.kind is x.KEYWORD_ONLY] == [x.name for x in found[5:]]
    assert all(x.default is x.empty for x in inputs)
    assert not any(x.default is x.empty for x in optional)


def test_int8_has_the_options_of_floats_but_dropout():
    expected = [name for name in names(flash_attention) if name not in OF_DROPOUT]
    expected.insert(-1, "probability_dtype")
    assert names(flash_attention_int8) == expected


def test_the_docstring_of_flash_attention_explains_every_argument():
    explained = inspect.getdoc(flash_attention) or ""
    assert [name for name in names(flash_attention) if f"\n    {name}: " not in explained] == []


@pytest.mark.parametrize("suffix", ["", "_with_lse"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_misspelt_option_is_named(name, suffix):
    function, x = getattr(flash_jax, name + suffix), jnp.ones((1, 2, 1, 3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'is_causl'"):
        function(x, x, x, is_causl=True)
    with pytest.raises(TypeError, match="'value'"):
        function(x, x)


@pytest.mark.parametrize("name", PAIRS)
def test_jit_knows_the_names_of_static_options(name):
    function, x = getattr(flash_jax, name), jnp.ones((1, 2, 1, 3))
    run = jax.jit(function, static_argnames="is_causal")
    assert jax.eval_shape(lambda x: run(x, x, x, is_causal=True), x).shape == x.shape
    with pytest.raises(ValueError, match="is_causl"):
        jax.jit(function, static_argnames="is_causl")
