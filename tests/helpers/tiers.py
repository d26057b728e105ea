"""Which tests are in which tier: ``floor``, ``quick``, ``thorough``.

A test is told by its file, in whichever folder, and the start of its name. ``first_cases.toml`` has
what is not thorough.
"""

import tomllib
from pathlib import Path

# One case of every kind whose way goes through what versions of JAX differ in: these run with the
# oldest JAX, too. What is computed before JAX has it is not here.
FLOOR = (
    "test_attention.py::test_every_option_agrees_with_the_oracle[everything]",
    "test_equinox.py::test_dropout_is_as_inference_says",
    "test_cache.py::test_any_schedule_of_calls[bfloat16]",
    "test_dropout.py::test_broadcast_dropout_under_vmap",
    "test_flax.py::test_the_layer_of_nnx[is_causal and grouped heads]",
    "test_forward_mode.py::test_a_second_reverse_pass_is_refused[none]",
    "test_gradients.py::test_gradients_of_every_option_are_exact[everything]",
    "test_memory.py::test_memory_of_derivatives_is_linear[none",
    "test_haiku.py::test_the_layer[Mask]",
    "test_int8.py::test_every_option_agrees_with_the_oracle[everything]",
    "test_keras.py::test_dropout_is_that_of_the_seed",
    "test_patch.py::test_it_is_ours_within_and_theirs_after",
    "test_peers.py::test_dot_product_attention_agrees_with_jax_nn[all]",
    "test_peers.py::test_flash_attention_agrees_with_torch",
    "test_peers.py::test_square_causal_attention_is_within_the_bound_of_torch",
    "test_programs.py::test_a_policy_of_checkpoint_runs_attention_once[flash_attention]",
    "test_programs.py::test_disable_jit_changes_no_result[parameters]",
    "test_ring.py::test_a_ring_gives_what_the_unsharded_call_gives[pairs",
    "test_score_mod.py::test_derivatives_are_those_of_the_formula[hessian",
    "test_short.py::test_decoding_does_not_copy_the_cache",
    "test_short.py::test_few_queries_agree_with_the_oracle[3-1-37-6-3-bfloat16]",
    "test_partition.py::test_the_mesh_table[meshes]",
    "test_symbolic.py::test_an_exported_call_takes_every_size[segments and bias",
    "test_vmap.py::test_vmap_is_the_loop_over_calls[Mask]",
)

# Every message, rule and definition, and every path once: for the inner loop, in under a minute.
# A name that ends with a slash is a folder's.
QUICK = (
    "checks/",
    "test_attention.py::test_every_option_agrees_with_the_oracle[everything]",
    "test_block_sizes.py",
    "test_cache.py::test_any_schedule_of_calls[float32]",
    "test_cache_contents.py::test_errors_name_the_argument",
    "test_indexing.py",
    "test_paged.py::test_a_shared_prefix_takes_its_pages_once",
    "test_docs.py",
    "test_extras.py::test_nothing",
    "test_fronts.py::test_an_empty_axis",
    "test_gradients.py::test_gradients_of_every_option_are_exact[everything]",
    "test_int8.py::test_every_option_agrees_with_the_oracle[everything]",
    "test_masks.py::test_to_array_is_the_definition[11-7",
    "test_masks.py::test_a_mask_can_be_built_inside",
    "test_mincut.py::test_errors",
    "test_mincut.py::test_parts_that_are_there",
    "test_mincut_labels.py",
    "test_mincut_mask.py::test_errors",
    "test_mincut_mask.py::test_the_mask_is_its_definition_and_the_density_is_honoured[runs-1-True]",
    "test_mincut_signal.py::test_schedules",
    "test_online_softmax.py",
    "test_output.py::test_scale_is_the_configs",
    "test_programs.py::test_jet_is_refused_by_name",
    "test_quantization.py",
    "test_ring.py::test_an_error",
    "test_ring.py::test_the_rounds",
    "test_ring.py::test_zigzag",
    "test_score_mod.py::test_the_catalogue_agrees_with_its_formulas[jagged",
    "test_short.py::test_few_queries_of_a_padded_cache_agree_with_the_oracle[block_sizes0-lengths0",
    "test_sparse.py::test_a_row_of_the_schedule",
    "test_choice.py::test_errors_name_the_argument",
)

FILES = tomllib.loads(Path(__file__).with_name("first_cases.toml").read_text())
FIRST = {f"{file}::{test}": x for file, tests in FILES.items() for test, x in tests.items()}
STARTS = {"floor": FLOOR, "quick": QUICK}


def of(path, nodeid):
    """The tiers of a test: what marks it."""
    found = [tier for tier, starts in STARTS.items() if named(starts, path, nodeid)]
    test, _, case = _name(path, nodeid).removesuffix("]").partition("[")
    if test in FIRST and not any(_is_case(first, case) for first in FIRST[test]):
        found.append("thorough")
    return found


def named(starts, path, nodeid):
    """Whether one of the starts is that of a test's name, or its folder."""
    return _name(path, nodeid).startswith(starts) or f"{path.parent.name}/" in starts


def _name(path, nodeid):
    return path.name + nodeid[nodeid.find("::") :]


def _is_case(first, case):
    return case.startswith(first[:-1]) if first.endswith("*") else case == first


def unseen(tier, items):
    """What the lists of a tier name and no test is, in the files that were collected or in none."""
    starts = STARTS.get(tier, ())
    if tier == "thorough":
        cases = [f"{test}[{case}]" for test, cases in FIRST.items() for case in cases]
        starts = [case.removesuffix("*]") for case in cases] + [x for x in FIRST if not FIRST[x]]
    files, tests = {item.path.name for item in items}, Path(__file__).parents[1]
    names = {_name(x.path, x.nodeid) for x in items} | {f"{x.path.parent.name}/" for x in items}
    lines = "\n".join(["", *names])
    absent = (x for x in starts if f"\n{x}" not in lines)
    return [x for x in absent if (file := x.split("::")[0]) in files or not [*tests.rglob(file)]]
