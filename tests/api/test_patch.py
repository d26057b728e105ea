"""jax.nn.dot_product_attention, replaced for a while."""

import functools
import threading
import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

import flash_jax
from flash_jax import patch_jax_nn
from flash_jax._api import patch as _patch

THEIRS = jax.nn.dot_product_attention
X = np.ones((1, 3, 1, 2), np.float32)


def unreached():
    return pytest.warns(UserWarning, match=r"patch_jax_nn\(\) did nothing: jax\.nn\.dot_product")


def patched():
    return getattr(jax.nn.dot_product_attention, "__wrapped__", None) is (
        flash_jax.dot_product_attention
    )


def call(**options):
    return jax.nn.dot_product_attention(X, X, X, **options)


def test_it_is_ours_within_and_theirs_after():
    with patch_jax_nn() as patch:
        assert patched()
        with patch_jax_nn() as inner:
            assert patched()
            call()
        assert patched()
        assert (patch.calls, inner.calls) == (1, 1)
        call()
    assert (patch.calls, inner.calls) == (2, 1)
    assert jax.nn.dot_product_attention is THEIRS


def test_exceptions_restore_it():
    with warnings.catch_warnings(action="error"), pytest.raises(KeyError), patch_jax_nn():
        raise KeyError
    assert jax.nn.dot_product_attention is THEIRS


def test_as_a_decorator():
    @patch_jax_nn()
    def decorated(calls):
        """Calls it so often."""
        for _ in range(calls):
            call()
        return patched()

    assert decorated(1)
    assert decorated(calls=2)
    with unreached() as caught:
        assert decorated(0)
    assert caught[0].filename == __file__
    assert decorated.__doc__ == "Calls it so often."
    assert not patched()


def test_a_patch_that_reached_nothing_warns_at_its_line():
    with unreached() as caught, patch_jax_nn() as patch:
        pass
    assert caught[0].filename == __file__
    assert patch.calls == 0


def test_functions_that_were_traced_before_are_not_reached_until_their_trace_is_forgotten():
    function = jax.jit(functools.partial(call, is_causal=True))
    function()
    with unreached(), patch_jax_nn():
        function()
    jax.clear_caches()
    with patch_jax_nn() as patch:
        function()
        function()
    assert patch.calls == 1  # once per trace


def test_what_another_put_there_comes_back(monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", sum)
    with patch_jax_nn():
        assert patched()
        call()
    assert jax.nn.dot_product_attention is sum


def test_patches_of_threads_end_in_any_order():
    first, second = patch_jax_nn(), patch_jax_nn()
    first.__enter__()
    second.__enter__()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    first.__exit__(None, None, None)
    assert patched()  # the second is there
    call()
    second.__exit__(None, None, None)
    assert jax.nn.dot_product_attention is THEIRS
    assert (first.calls, second.calls) == (1, 2)


def test_one_patch_is_not_entered_twice_at_a_time():
    with patch_jax_nn() as patch:
        call()
        with pytest.raises(RuntimeError, match="must be called for each `with`"), patch:
            pass
    assert jax.nn.dot_product_attention is THEIRS
    with unreached(), patch:  # but again
        pass


@pytest.mark.parametrize("implementation", ["cudnn", "xla", "other"])
def test_any_implementation_is_ours(implementation):
    expected = flash_jax.dot_product_attention(X, X, X)
    with patch_jax_nn(any_implementation=True):
        np.testing.assert_array_equal(call(implementation=implementation), expected)

    @patch_jax_nn(any_implementation=True)
    def decorated():
        return call(implementation=implementation)

    np.testing.assert_array_equal(decorated(), expected)


def test_another_implementation_raises_as_ever():
    with pytest.raises(NotImplementedError, match="implementation"), patch_jax_nn():
        call(implementation="cudnn")


def test_options_are_passed_on_where_the_call_leaves_them_out(monkeypatch):
    def received(query, key, value, *, scale=None, ours=None):
        return scale, ours

    monkeypatch.setattr(_patch, "dot_product_attention", received)
    with patch_jax_nn(ours=3, scale=2.0):
        assert call() == (2.0, 3)
        assert call(scale=4.0) == (4.0, 3)
    with pytest.raises(TypeError, match="options must be among scale, ours; one is query"):
        patch_jax_nn(query=3)


def test_what_is_no_option_is_named():
    with pytest.raises(TypeError, match=r"options must be among scale, .*; one is dropout_rate"):
        patch_jax_nn(dropout_rate=0.1)
    with pytest.raises(TypeError, match="any_implementation must be a bool"):
        patch_jax_nn(any_implementation="cudnn")


def test_it_reaches_the_layer_of_flax():
    """Of rows that read no key ours makes zero, and theirs the mean of the values."""
    layer = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    x, mask = jnp.arange(24.0).reshape(2, 3, 4), np.zeros((2, 1, 3, 3), bool)
    with patch_jax_nn() as patch:
        np.testing.assert_array_equal(layer(x, mask=mask), 0)
    assert patch.calls == 1
    assert np.all(layer(x, mask=mask) != 0)
