import pytest

from flash_jax import FlashAttentionConfig
from flash_jax._machine import processor
from flash_jax._machine.processor import DEFAULT_CACHES, Machine, machine
from flash_jax._machine.tile_rule import Problem, fastest_blocks, kernel_blocks, score_bytes
from flash_jax._passes.walk import heads_per_step, instances_per_step

SMALL = Machine(cores=2, l1=32 * 2**10, l2=2**20, l3=0, measured=True)
STEP_SCORES = score_bytes(SMALL) // 4
LARGE = Machine(cores=64, l1=48 * 2**10, l2=2 * 2**20, l3=2**28, measured=True)


@pytest.mark.parametrize("here", [SMALL, LARGE, machine()])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [1, 5, 64, 128, 1000])
@pytest.mark.parametrize(
    ("T", "S"), [(1, 1), (17, 5), (1025, 1025), (2048, 2048), (1, 10**6), (10**6, 1)]
)
def test_tiles_fit_the_machine_and_the_lengths(here, causal, head_dim, T, S):
    q, kv = fastest_blocks(here, Problem(T, S, head_dim, masked=causal))
    assert 1 <= q <= T
    assert 1 <= kv <= S
    assert 4 * q * kv <= score_bytes(here)
    # The tiles of an axis are equally long, up to a vector: no axis ends in a stump.
    assert -(-T // q) * q - T < 16 * -(-T // q)


@pytest.mark.parametrize("here", [SMALL, LARGE, LARGE._replace(cores=1009)])
@pytest.mark.parametrize("problem", [{}, {"masked": True}, {"masked": True, "reach": 257}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (17, 5), (2048, 2048), (1, 10**6), (10**6, 1)])
def test_the_scratch_of_all_tasks_of_a_kernel_is_bounded(here, problem, dtype, T, S):
    q, kv = kernel_blocks(here, Problem(T, S, 64, heads=3, dtype=dtype, **problem))
    assert 1 <= q <= T
    assert 1 <= kv <= S
    assert 4 * min(q, 512) * kv * here.cores <= 64 * 2**20


def test_cores_are_those_of_one_of_several_cpu_devices(monkeypatch):
    cores = processor._read().cores
    monkeypatch.setattr(processor, "cpu_devices", lambda: cores)
    assert machine().cores == 1
    monkeypatch.setattr(processor, "cpu_devices", lambda: 1009 * cores)
    assert machine().cores == 1


@pytest.mark.parametrize("heads", [1, 7, 8, 12, 32])
def test_heads_per_step_divide_the_heads_and_fit(heads):
    for scores in (1, 64, 10**4, 2**20, 10**9):
        n = heads_per_step(STEP_SCORES, heads, scores)
        assert heads % n == 0
        assert n == 1 or n * scores <= STEP_SCORES


@pytest.mark.parametrize("instances", [1, 7, 12, 64, 1009])
@pytest.mark.parametrize("scores", [1, 10**4, 10**6, 10**8])
@pytest.mark.parametrize("keys", [1, 10**6])
def test_instances_per_step_divide_their_number_and_fit(instances, scores, keys):
    n = instances_per_step(STEP_SCORES, instances, scores, keys)
    assert instances % n == 0
    assert n == 1 or n * scores <= STEP_SCORES
    # What a step copies of them fits, too; all of it is not copied.
    assert n in (1, instances) or n * keys <= STEP_SCORES


def test_few_queries_over_all_keys_take_one_tile_and_a_padded_cache_several():
    problem = Problem(1, 4099, 64, heads=4, groups=2)
    assert fastest_blocks(SMALL, problem) == (1, 4099)
    assert fastest_blocks(SMALL, problem._replace(masked=True)).kv < 1024


def test_auto_uses_this_machines_rule():
    config = FlashAttentionConfig.auto(64, 4096, 2048, causal=True)
    assert config.block_sizes == fastest_blocks(machine(), Problem(4096, 2048, 64, masked=True))


@pytest.mark.parametrize("causal", [False, True])
def test_auto_cuts_keys_shorter_for_the_int8_kernels(causal):
    config = FlashAttentionConfig.auto(128, 4096, 4096, causal=causal, int8=True)
    assert config.block_size_kv == (256 if causal else 192)
    assert config.block_size_kv < FlashAttentionConfig.auto(128, 4096, 4096).block_size_kv


def cache_files(folder, entries):
    for i, (level, kind, size) in enumerate(entries):
        index = folder / f"index{i}"
        index.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (index / name).write_text(f"{text}\n")


def test_cache_sizes_are_read_from_the_system(tmp_path):
    cache_files(
        tmp_path,
        [
            (1, "Data", "48K"),
            (1, "Instruction", "64K"),
            (2, "Unified", "2M"),
            (3, "Unified", "512"),
        ],
    )
    assert processor._linux_caches(tmp_path) == {1: 48 * 2**10, 2: 2 * 2**20, 3: 512}


@pytest.mark.parametrize("entries", [[], [(1, "Data", "?")], [("", "Data", "48K")]])
def test_unreadable_cache_sizes_fall_back_to_the_defaults(entries, tmp_path, monkeypatch):
    cache_files(tmp_path, entries)
    monkeypatch.setattr(processor, "_LINUX_CACHES", tmp_path)
    monkeypatch.setattr(processor.platform, "system", lambda: "Linux")
    here = processor._read.__wrapped__()
    assert not here.measured
    assert here[1:4] == DEFAULT_CACHES
