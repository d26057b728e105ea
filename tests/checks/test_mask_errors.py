"""Errors of masks name the field."""

import numpy as np
import pytest
from jax import numpy as jnp
from refusals import B, S, T, attend, f32, i32, refused

from flash_jax import (
    BlockSparseMask,
    CausalMask,
    LengthMask,
    PredicateMask,
    PrefixMask,
    SegmentMask,
    WindowMask,
    block_schedule,
)

LISTS = "BlockSparseMask.from_indices: "


def bools(*shape):
    return np.ones(shape, bool)


def blocks(table):
    return BlockSparseMask(table, (2, 2))


def lists(indices, counts):
    return BlockSparseMask.from_indices(indices, counts, (2, 2), 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CausalMask(1.5), TypeError, "CausalMask.offset must be integers; .*float32"),
        (lambda: CausalMask(i32(3)), ValueError, r"CausalMask.offset must be .*2.*; .*\(3,\)"),
        (lambda: CausalMask(i32(B, 1)), ValueError, r"CausalMask.offset must be .*\(2, 1\)"),
        (lambda: WindowMask(-1, 0), ValueError, "left must be >= 0; it is -1"),
        (lambda: WindowMask(0, -2), ValueError, "right must be >= 0; it is -2"),
        (lambda: WindowMask(1, 0.5), TypeError, "right must be an integer or None; it is 0.5"),
        (lambda: WindowMask(jnp.int32(1), 0), TypeError, "left must be an integer or None"),
        (lambda: WindowMask(1, 0, True), TypeError, "WindowMask.offset must be integers; .*bool"),
        (lambda: SegmentMask(i32(S), i32(S)), ValueError, r"SegmentMask.q_ids must .*\(7,\)"),
        (lambda: SegmentMask(i32(T), 1), ValueError, r"SegmentMask.kv_ids must .*\(\)"),
        (lambda: SegmentMask(i32(3, T), i32(S)), ValueError, r"SegmentMask.q_ids must .*\(3, 5\)"),
        (lambda: SegmentMask(f32(T), i32(S)), TypeError, "SegmentMask.q_ids must be integers"),
        (lambda: LengthMask(1.5), TypeError, "LengthMask.q must be integers; .*float32"),
        (lambda: LengthMask(kv=i32(3)), ValueError, r"LengthMask.kv must be .*\(3,\)"),
        (lambda: PrefixMask(True), TypeError, "PrefixMask.n must be integers; .*bool"),
        (lambda: blocks(bools(2, 4)), ValueError, r"BlockSparseMask.table must be .*\(2, 4\)$"),
        (
            lambda: blocks(bools(5, 3, 4)),
            ValueError,
            r"BlockSparseMask.table must be .*\(5, 3, 4\)$",
        ),
        (
            lambda: blocks(bools(3, 1, 3, 4)),
            ValueError,
            r"BlockSparseMask.table must .* = \(\[2, 6 or",
        ),
        (lambda: blocks(i32(3, 4)), TypeError, "BlockSparseMask.table must be bool; its dtype is"),
        (lambda: blocks(None), TypeError, "BlockSparseMask.table must be bool; it is None"),
        (lambda: BlockSparseMask(bools(3, 4), 2), TypeError, "block_sizes must be a pair"),
        (
            lambda: lists([[0, 4]] * 3, [1, 2, 1]),
            ValueError,
            LISTS + "indices must be in 0..3; one is 4",
        ),
        (
            lambda: lists([[0, 1]] * 3, [1, 2]),
            ValueError,
            LISTS + r"counts must be \(3,\), .*\(2,\)",
        ),
        (lambda: lists(f32(3, 2), [1] * 3), TypeError, LISTS + "indices must be integers"),
        (lambda: CausalMask(2**31), ValueError, f"CausalMask.offset must fit .*; it is {2**31}"),
        (lambda: LengthMask([1, 2**40]), ValueError, "LengthMask.q must fit into int32"),
        (lambda: SegmentMask([1, [2]], 1), TypeError, r"SegmentMask.q_ids .*; it is \[1, \[2\]\]"),
        (
            lambda: PrefixMask(1) | (CausalMask() & LengthMask(kv=2.0)),
            TypeError,
            "LengthMask.kv must be integers; .*float32",
        ),
        (
            lambda: PredicateMask(lambda b, h, q_index, k_index: q_index - k_index),
            TypeError,
            "fn of PredicateMask must return bool; it returned int32",
        ),
    ],
)
def test_an_error_of_a_mask_names_its_field(make, error, message):
    with refused(error, message):
        attend(mask=make())


@pytest.mark.parametrize(
    ("combine", "message"),
    [
        (lambda: CausalMask() & 1, "CausalMask.*int"),
        (lambda: CausalMask() | jnp.ones((T, S), bool), "CausalMask.*Array"),
        (lambda: np.ones((T, S), bool) & CausalMask(), "CausalMask"),
    ],
)
def test_a_mask_and_no_mask_do_not_combine(combine, message):
    with pytest.raises(TypeError, match=message):
        combine()


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: mask and LengthMask(kv=3),
        lambda mask: None or mask or LengthMask(kv=3),
        lambda mask: not mask,
        lambda mask: any([mask]),
    ],
)
@pytest.mark.parametrize("mask", [CausalMask(), CausalMask() & PrefixMask(2)])
def test_a_mask_is_no_bool(mask, use):
    with refused(TypeError, f"{type(mask).__name__} must not be used as a bool: .* by & and \\|"):
        use(mask)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CausalMask().to_array(0, 3), ValueError, "T must be > 0; it is 0"),
        (lambda: CausalMask().to_array(3, -1), ValueError, "S must be > 0; it is -1"),
        (lambda: CausalMask().to_array(2.0, 3), TypeError, "T must be an integer; it is 2.0"),
        (
            lambda: SegmentMask(i32(T), i32(S)).to_array(T, T),
            ValueError,
            r"\S*kv_ids must .*\(7,\)",
        ),
        (lambda: block_schedule(CausalMask, 5, 5, (2, 2)), TypeError, "mask must be a Mask.*type"),
        (
            lambda: block_schedule(np.tri(5), 5, 5, (2, 2)),
            TypeError,
            "mask must be a Mask.*ndarray",
        ),
        (
            lambda: block_schedule(None, 5, 5.0, (2, 2)),
            TypeError,
            "S must be an integer; it is 5.0",
        ),
        (
            lambda: block_schedule(SegmentMask(i32(T), i32(S)), S, S, (2, 2)),
            ValueError,
            r"SegmentMask.q_ids must be .*7.*; .*\(5,\)",
        ),
    ],
)
def test_an_error_of_a_look_at_a_mask_names_the_argument(call, error, message):
    with refused(error, message):
        call()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: CausalMask(None), "CausalMask.offset"),
        (lambda: WindowMask(1, 1, None), "WindowMask.offset"),
        (lambda: SegmentMask(None, i32(S)), "SegmentMask.q_ids"),
        (lambda: PrefixMask(None), "PrefixMask.n"),
        (lambda: PredicateMask(3), "fn"),
    ],
)
def test_a_field_of_a_mask_that_is_missing_is_named(make, name):
    with refused(TypeError, rf"{name}.* must be .*(None|3)"):
        attend(mask=make())


@pytest.mark.parametrize(
    "fn",
    [
        lambda b, h, q_index, k_index: jnp.ones((3, 3), bool),
        lambda b, h, q_index, k_index: (q_index >= k_index)[None],
    ],
)
def test_a_predicate_must_return_what_broadcasts_with_its_indices(fn):
    with refused(ValueError, "fn of PredicateMask must return"):
        attend(mask=PredicateMask(fn))


@pytest.mark.parametrize("argument", ["batch", "head"])
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), ("0", TypeError)])
def test_a_look_at_a_mask_names_a_wrong_element(argument, value, error):
    element = {argument: value}
    with refused(error, f"{argument} must be .*{value}"):
        CausalMask().to_array(3, 3, **element)
    with refused(error, f"{argument} must be .*{value}"):
        block_schedule(CausalMask(), 3, 3, (2, 2), **element)


def test_a_look_at_a_mask_beyond_its_batch_is_refused():
    with refused(ValueError, r"batch must be .*2.*it is 2"):
        CausalMask(i32(2)).to_array(3, 3, batch=2)
