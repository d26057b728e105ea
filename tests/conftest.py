from pathlib import Path

import jax
import numpy as np
import pytest

# One case of every kind, by its file, in whichever folder, and the start of its name: these run
# with the oldest JAX, too.
FLOOR = (
    "test_attention.py::test_every_option_agrees_with_the_oracle[everything]",
    "test_attention.py::test_float64_is_computed_in_float64[everything]",
    "test_attention.py::test_masks_agree_with_the_oracle_and_rows_without_keys_are_zero[segments]",
    "test_attention.py::test_merged_parts_of_the_keys_are_the_whole[cuts2-bfloat16]",
    "test_cli.py::test_demo_prints_accuracy_cost_and_text",
    "test_dropout.py::test_broadcast_dropout_under_vmap",
    "test_dropout.py::test_dropout_makes_a_program_at_most_three_times_as_large",
    "test_dropout.py::test_neighbours_are_dropped_independently",
    "test_equinox.py::test_dropout",
    "test_errors.py::test_an_option_that_is_compiled_in_cannot_be_traced",
    "test_flax.py::test_the_layer_of_linen[batch axes]",
    "test_flax.py::test_the_layer_of_nnx[is_causal and grouped heads]",
    "test_gradients.py::test_a_second_reverse_pass_is_refused",
    "test_gradients.py::test_forward_mode_agrees_with_the_plain_formula[hessian_vector_product",
    "test_gradients.py::test_forward_mode_agrees_with_the_plain_formula[jvp",
    "test_gradients.py::test_gradients_of_every_option_are_exact[everything]",
    "test_gradients.py::test_memory_of_derivatives_is_linear[none",
    "test_haiku.py::test_the_layer[Mask]",
    "test_int8.py::test_a_quantized_cache_is_not_spread_to_floats",
    "test_int8.py::test_every_option_agrees_with_the_oracle[everything]",
    "test_int8.py::test_gradients_reach_bias_scale_and_the_scales_of_quantized_keys",
    "test_int8.py::test_kernel_products_are_of_bytes[1]",
    "test_keras.py::test_dropout_is_that_of_the_seed",
    "test_masks.py::test_attention_with_a_mask_is_attention_with_its_array[11-7-blocks0-(causal |",
    "test_memory.py::test_keys_and_values_are_brought_into_order_by_head_in_one_copy",
    "test_memory.py::test_memory_is_linear[float32-True]",
    "test_output.py::test_error_is_at_most_twice_that_of_plain_attention[129-257-float32-True]",
    "test_patch.py::test_it_is_ours_within_and_theirs_after",
    "test_peers.py::test_dot_product_attention_agrees_with_jax_nn[all]",
    "test_peers.py::test_flash_attention_agrees_with_torch",
    "test_peers.py::test_square_causal_attention_is_within_the_bound_of_torch",
    "test_programs.py::test_a_policy_of_checkpoint_runs_attention_once",
    "test_programs.py::test_disable_jit_changes_no_result[parameters]",
    "test_programs.py::test_jet_is_refused_by_name",
    "test_quantization.py::test_values_are_within_half_a_scale[float32-bricks]",
    "test_short.py::test_decoding_does_not_copy_the_cache",
    "test_short.py::test_few_queries_agree_with_the_oracle[3-1-37-6-3-bfloat16]",
    "test_sharding.py::test_every_path_under_shard_map[short",
    "test_symbolic.py::test_an_exported_call_takes_every_size[Mask",
    "test_transforms.py::test_an_exported_call_takes_masks",
    "test_transforms.py::test_every_option_gives_the_same_bits_jitted_and_in_the_strict_modes",
    "test_transforms.py::test_vmap_is_the_batched_call_and_the_loop[Mask]",
)


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config, items):
    unseen, files = set(FLOOR), set()
    for item in items:
        name = item.path.name + item.nodeid[item.nodeid.find("::") :]
        kinds = {kind for kind in FLOOR if name.startswith(kind)}
        unseen -= kinds
        files.add(item.path.name)
        if kinds:
            item.add_marker(pytest.mark.floor)
    for kind in unseen:
        file = kind.split("::")[0]
        exists = any(Path(__file__).parent.rglob(file))
        if config.option.markexpr == "floor" and (file in files or not exists):
            raise pytest.UsageError(f"FLOOR names tests that are not there: {kind}")


@pytest.fixture
def rng():
    return np.random.default_rng(20180508)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
