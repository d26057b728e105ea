import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import flash_jax
from flash_jax import BlockSizes, FlashAttentionConfig, flash_attention, tune
from flash_jax._machine import tuned as _choices
from flash_jax._machine.processor import machine
from flash_jax._machine.tile_rule import Problem, fastest_blocks, kernel_blocks
from flash_jax._machine.timing import alternate
from flash_jax._machine.tuned import best_blocks, path, store, stored

PROBLEM = Problem(47, 61, 5, heads=2, groups=1, masked=True)
OTHER = BlockSizes(13, 29)  # no rule picks these


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_choices, "_loaded", None)


def forget():
    """As a new process begins."""
    _choices._loaded = None


def arrays(T=47, S=61, N=2, H=5):
    return jnp.ones((1, T, N, H)), jnp.ones((1, S, N, H)), jnp.ones((1, S, N, H))


def tiles_of(function, *args):
    """The tiles that a call uses: the static parameter of its primitive."""
    text = str(jax.make_jaxpr(lambda *args: function(*args))(*args))  # not one traced before
    start = text.index("BlockSizes(")
    return eval(text[start : text.index(")", start) + 1], {"BlockSizes": BlockSizes})


def test_without_choices_the_rule_picks():
    assert best_blocks(PROBLEM) == fastest_blocks(machine(), PROBLEM)
    assert not path().exists()


def test_a_choice_outlives_the_process_and_is_found_for_any_number_of_heads():
    store(PROBLEM, OTHER)
    assert best_blocks(PROBLEM) == OTHER
    forget()
    assert best_blocks(PROBLEM._replace(heads=7)) == OTHER
    for other in ({"T": 48}, {"masked": False}, {"groups": 2}, {"reach": 9}, {"dtype": "bfloat16"}):
        problem = PROBLEM._replace(**other)
        assert best_blocks(problem) == fastest_blocks(machine(), problem)


def test_calls_and_auto_use_a_choice_and_block_sizes_win():
    def call(*args):
        return flash_attention(*args, is_causal=True)

    assert tiles_of(call, *arrays()) != OTHER  # and compiled, so that a later call must notice
    before = call(*arrays())
    store(PROBLEM, OTHER)
    assert tiles_of(call, *arrays()) == OTHER
    np.testing.assert_allclose(call(*arrays()), before, rtol=1e-6)
    assert FlashAttentionConfig.auto(5, 47, 61, causal=True).block_sizes == OTHER
    given = lambda *args: flash_attention(*args, is_causal=True, block_sizes=(7, 9))  # noqa: E731
    assert tiles_of(given, *arrays()) == (7, 9)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"int8": True}])
def test_tune_measures_stores_and_shows_progress(options, capsys):
    best = tune(*arrays(), rounds=1, **options)
    assert list(stored().values()) == [best]
    forget()
    (problem,) = stored()
    assert best_blocks(problem) == best
    assert (problem.T, problem.S, problem.masked) == (47, 61, "is_causal" in options)
    assert problem.dtype == ("int8" if "int8" in options else "float32")
    captured = capsys.readouterr()
    assert "rounds" in captured.err
    assert not captured.out
    int8 = "int8" in options
    causal = "is_causal" in options
    assert FlashAttentionConfig.auto(5, 47, 61, causal=causal, int8=int8).block_sizes == best


def test_runs_alternate_after_two_of_each_that_do_not_count():
    calls = []
    seconds = alternate({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == ["a", "b"] * 5
    assert [x.shape for x in seconds.values()] == [(3,), (3,)]


def test_tune_keeps_the_fastest(monkeypatch):
    from flash_jax._api import tune as _tune

    def measured(call, candidates, rounds):
        here, problem = machine(), Problem(301, 309, 5)
        rule = kernel_blocks if here.one_kernel else fastest_blocks  # what calls take untuned
        assert candidates[0] == rule(here, problem)
        return {x: np.array([1.0 + (x != BlockSizes(128, 256))]) for x in candidates}

    monkeypatch.setattr(_tune, "_measure", measured)
    assert tune(*arrays(T=301, S=309)) == (128, 256)
    assert stored() == {Problem(301, 309, 5): (128, 256)}


def test_tune_raises_before_it_measures(capsys):
    query, key, value = arrays()
    with pytest.raises(TypeError, match="query must be concrete"):
        jax.jit(lambda query: tune(query, key, value))(query)
    with pytest.raises(TypeError, match="block_sizes must not be given"):
        tune(query, key, value, block_sizes=(7, 7))
    with pytest.raises(ValueError, match="key must be"):
        tune(query, key[..., :3], value)
    with pytest.raises(TypeError, match="rounds must be an integer"):
        tune(query, key, value, rounds=1.5)
    assert not capsys.readouterr().err
    assert not path().exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '{"some CPU": 3}',
        '{"some CPU": [{"T": 1}]}',
        json.dumps({"some CPU": [{**PROBLEM._asdict(), "block_sizes": [0, 4]}]}),
        json.dumps({"some CPU": [{**PROBLEM._asdict(), "block_sizes": "ab"}]}),
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(text):
    path().parent.mkdir(parents=True)
    path().write_text(text)
    with pytest.warns(UserWarning, match="damaged"):
        assert best_blocks(PROBLEM) == fastest_blocks(machine(), PROBLEM)
    best_blocks(PROBLEM)  # warned of once
    with pytest.warns(UserWarning, match="damaged"):
        store(PROBLEM, OTHER)
    forget()
    assert best_blocks(PROBLEM) == OTHER


def test_bytes_that_are_no_text_are_ignored_with_a_warning():
    path().parent.mkdir(parents=True)
    path().write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match="can't be read"):
        assert stored() == {}


def test_choices_of_other_processors_are_kept_and_not_used():
    there = [{**PROBLEM._asdict(), "block_sizes": [3, 4]}]
    path().parent.mkdir(parents=True)
    path().write_text(json.dumps({"some CPU, 96 cores": there}))
    assert stored() == {}
    store(PROBLEM, OTHER)
    assert json.loads(path().read_text())["some CPU, 96 cores"] == there


def test_where_nothing_can_be_written_a_choice_lasts_for_the_process(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")  # of a read-only one the superuser takes no notice
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"can't be read|lasts for this process"):
        store(PROBLEM, OTHER)
    assert best_blocks(PROBLEM) == OTHER


def test_a_failed_write_leaves_the_old_file_and_no_other(monkeypatch):
    store(PROBLEM, OTHER)
    old = path().read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(_choices.Path, "replace", fail)
    with pytest.warns(UserWarning, match="disk full"):
        store(PROBLEM._replace(T=5), OTHER)
    assert path().read_text() == old
    assert [file.name for file in path().parent.iterdir()] == [path().name]


def test_the_file_names_the_versions():
    assert flash_jax.__version__ in path().name
    assert jax.lib.__version__ in path().name
