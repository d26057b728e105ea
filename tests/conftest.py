from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

# One case of every kind, by its file, in whichever folder, and the start of its name: these run
# with the oldest JAX, too.
FLOOR = (
    "test_attention.py::test_every_option_agrees_with_the_oracle[everything]",
    "test_equinox.py::test_dropout_is_as_inference_says",
    "test_masking.py::test_masks_agree_with_the_oracle_and_rows_without_keys_are_zero[segments]",
    "test_cache.py::test_any_schedule_of_calls[bfloat16]",
    "test_cache.py::test_of_a_long_cache_the_filled_part_is_read[int8]",
    "test_cache_contents.py::test_tokens_are_appended_in_place[int8",
    "test_demo_command.py::test_demo_prints_accuracy_cost_and_text",
    "test_dropout.py::test_broadcast_dropout_under_vmap",
    "test_dropout.py::test_neighbours_are_dropped_independently",
    "test_errors.py::test_an_option_that_is_compiled_in_cannot_be_traced",
    "test_flax.py::test_the_layer_of_nnx[is_causal and grouped heads]",
    "test_forward_mode.py::test_a_second_reverse_pass_is_refused",
    "test_forward_mode.py::test_forward_mode_agrees_with_the_plain_formula[hessian_vector_product",
    "test_gradients.py::test_gradients_of_every_option_are_exact[everything]",
    "test_memory.py::test_memory_of_derivatives_is_linear[none",
    "test_haiku.py::test_the_layer[Mask]",
    "test_int8_programs.py::test_a_quantized_cache_is_not_spread_to_floats",
    "test_int8.py::test_every_option_agrees_with_the_oracle[everything]",
    "test_int8_derivatives.py::test_gradients_reach_bias_scale_and_the_scales_of_quantized_keys",
    "test_int8_programs.py::test_kernel_products_are_of_bytes[1]",
    "test_keras.py::test_dropout_is_that_of_the_seed",
    "test_masks.py::test_attention_with_a_mask_is_attention_with_its_array[11-7-blocks0-(causal |",
    "test_sparse.py::test_gradients_of_any_table_are_exact[lists per key head",
    "test_memory.py::test_keys_and_values_are_brought_into_order_by_head_in_one_copy",
    "test_memory.py::test_memory_is_linear[float32-True]",
    "test_patch.py::test_it_is_ours_within_and_theirs_after",
    "test_peers.py::test_dot_product_attention_agrees_with_jax_nn[all]",
    "test_peers.py::test_flash_attention_agrees_with_torch",
    "test_peers.py::test_square_causal_attention_is_within_the_bound_of_torch",
    "test_programs.py::test_a_policy_of_checkpoint_runs_attention_once[flash_attention]",
    "test_programs.py::test_disable_jit_changes_no_result[parameters]",
    "test_programs.py::test_jet_is_refused_by_name",
    "test_quantization.py::test_values_are_within_half_a_scale[float32-bricks]",
    "test_ring.py::test_a_ring_gives_what_the_unsharded_call_gives[pairs, keys]",
    "test_score_mod.py::test_derivatives_are_those_of_the_formula[hessian",
    "test_score_mod.py::test_no_tracer_is_kept",
    "test_short.py::test_decoding_does_not_copy_the_cache",
    "test_short.py::test_few_queries_agree_with_the_oracle[3-1-37-6-3-bfloat16]",
    "test_partition.py::test_the_mesh_table[meshes]",
    "test_symbolic.py::test_an_exported_call_takes_every_size[Mask",
    "test_transforms.py::test_an_exported_call_takes_masks",
    "test_fronts.py::test_strict_modes_of_jax[model]",
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
    "test_masks.py::test_to_array_is_the_definition",
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
    "test_short.py::test_few_queries_of_a_padded_cache",
    "test_sparse.py::test_a_row_of_the_schedule",
    "test_choice.py::test_errors_name_the_argument",
)
KINDS = {"floor": FLOOR, "quick": QUICK}

# LLVM takes most of the time to compile. It optimizes the programs of these files and of the quick
# tests; all others are tests of formulas. `pytest --optimized` has it optimize those, too.
OPTIMIZED = (
    "test_int8_accuracy.py",
    "test_kernel.py",
    "test_minilm.py",
    "test_output.py",
    "test_peers.py",
    "test_short.py",
)


def pytest_addoption(parser):
    parser.addoption("--optimized", action="store_true", help="compile all programs as users do")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config, items):
    unseen, files = {name: set(starts) for name, starts in KINDS.items()}, set()
    for item in items:
        name = item.path.name + item.nodeid[item.nodeid.find("::") :]
        folder = f"{item.path.parent.name}/"
        files.add(item.path.name)
        for kind, starts in KINDS.items():
            found = {start for start in starts if name.startswith(start) or start == folder}
            unseen[kind] -= found
            if found:
                item.add_marker(kind)
    for start in unseen.get(config.option.markexpr, ()):
        file = start.split("::")[0]
        exists = any(Path(__file__).parent.rglob(file))
        if file in files or not exists:
            raise pytest.UsageError(f"tests/conftest.py names tests that are not there: {start}")
    # The longest tests first: else one process waits for them at the end. Then all that are not
    # optimized: a process that goes from one kind to the other forgets its programs.
    longest = "test_partition.py", "test_ring.py", "test_processes.py"
    items.sort(key=lambda item: (item.path.name not in longest, is_optimized(item)))


def is_optimized(item):
    quick = item.get_closest_marker("quick") is not None
    return quick or item.path.name in OPTIMIZED or item.config.option.optimized


@pytest.fixture(autouse=True)
def _optimized(request):
    optimized = is_optimized(request.node)
    if jax.config.values["jax_disable_most_optimizations"] == optimized:
        jax.config.update("jax_disable_most_optimizations", not optimized)
        jax.clear_caches()  # a test of bits must not meet programs of both kinds


@pytest.fixture
def rng():
    return np.random.default_rng(20180508)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compiled_here():
    """For tests of programs: one from the cache has another text and size."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()
