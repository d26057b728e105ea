import jax
import numpy as np
import pytest
import tiers
from jax.experimental.compilation_cache import compilation_cache

# LLVM takes most of the time to compile. It optimizes the programs of these tests, for bits, errors
# and texts of programs, and of the quick ones; a name is here by its start. All others are tests
# of formulas. `pytest --optimized` has it optimize those, too.
OPTIMIZED = (
    "test_int8_accuracy.py",
    "test_kernel.py::test_a_tile_is_one_kernel",
    "test_kernel.py::test_attention_of_whole_rows_is_one_kernel",
    "test_kernel.py::test_every_option_agrees_with_the_oracle[everything",
    "test_kernel.py::test_the_future_and_padding_change_no_bit",
    "test_kernel.py::test_what_is_masked_changes_no_bit",
    "test_kernel.py::test_whole_rows",
    "test_minilm.py",
    "test_output.py",
    "test_peers.py::test_square_causal_attention_is_within_the_bound_of_torch",
    "test_short.py::test_decoding_does_not_copy_the_cache",
)
LONGEST = "test_partition.py", "test_ring.py", "test_processes.py"


def pytest_addoption(parser):
    parser.addoption("--optimized", action="store_true", help="compile all programs as users do")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config, items):
    for item in items:
        for tier in tiers.of(item.path, item.nodeid):
            item.add_marker(tier)
    # The longest tests first: else one process waits for them at the end. Then all that are not
    # optimized: a process that goes from one kind to the other forgets its programs.
    items.sort(key=lambda item: (item.path.name not in LONGEST, is_optimized(item)))
    for item in items:  # the tests of a file share programs: one process runs them
        if item.path.name not in LONGEST:
            group = f"{item.path.name}, {'optimized' if is_optimized(item) else 'not'}"
            item.add_marker(pytest.mark.xdist_group(group))
    whole = not any("::" in argument for argument in config.args) and not config.option.lf
    stale = tiers.unseen(config.option.markexpr.removeprefix("not "), items) if whole else ()
    if stale:
        raise pytest.UsageError(f"tests/helpers/tiers.py names tests that are not there: {stale}")


def is_optimized(item):
    quick = item.get_closest_marker("quick") is not None
    named = tiers.named(OPTIMIZED, item.path, item.nodeid)
    return quick or named or item.config.option.optimized


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
