"""The command line: what it predicts, prints and refuses."""

import builtins
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest

from flash_jax import __version__
from flash_jax.__main__ import main
from flash_jax._cli import demo, demo_view, info
from flash_jax._machine import processor
from flash_jax._machine.processor import DEFAULT_CACHES, Machine
from flash_jax._tiles.tile import BlockSizes

# No 8 bytes occur twice in it, so 8 bytes tell how it goes on.
WORDS = b"the cat sat on the mat, and a dog ran over some log; then it rained.\n"
TEXT = (WORDS * 60)[:3001]


def as_bytes(text):
    return np.frombuffer(text, np.uint8)


def mixed_text(rng, n):
    """Draws n bytes: a few words, each of which occurs often."""
    words = [rng.integers(97, 101, rng.integers(1, 6)) for _ in range(11)]
    picks = (words[i] for i in rng.integers(0, len(words), n))
    return np.concatenate([np.append(word, 32) for word in picks])[:n].astype(np.uint8)


def nearest_byte_scores(data, context, byte):
    """Computes the scores of all bytes at positions 1.., in float64, one position at a time."""
    lags, size = context.shape[0], context.shape[-1]
    contexts = []
    for s in range(len(data)):
        total = np.zeros(size)
        for lag in range(1, min(lags, s) + 1):
            total += 0.8**lag * context[lag - 1, data[s - lag]].astype(np.float64)
        length = np.sqrt(np.sum(total**2))
        contexts.append(total / length if length else total)
    scores = []
    for t in range(1, len(data)):
        logits = np.array([30 * contexts[t] @ contexts[s] for s in range(t)])
        weights = np.exp(logits - logits.max())
        mean = sum(w * byte[data[s]] for s, w in enumerate(weights)) / weights.sum()
        scores.append(byte.astype(np.float64) @ mean)
    return np.array(scores)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return str(path)


@pytest.fixture
def no_module(monkeypatch):
    """Makes the import of a module, and of all in it, fail."""

    def remove(name):
        real = builtins.__import__

        def fake(module, *args, **kwargs):
            if module.split(".")[0] == name:
                raise ImportError(f"No module named {module!r}")
            return real(module, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fake)

    return remove


@pytest.fixture
def no_run(monkeypatch):
    """Fails if the long computation begins."""

    def fail(*_):
        raise AssertionError("computed before the options were checked")

    monkeypatch.setattr(demo, "measure", fail)


# --- Prediction


def test_predictions_are_those_of_a_slow_float64_loop():
    data = mixed_text(np.random.default_rng(0), 257)
    codes = demo.random_codes(3)
    scores = nearest_byte_scores(data, *codes)
    predicted = demo.predict(data, codes, BlockSizes(48, 37))
    first, second = np.sort(scores)[:, :-3:-1].T
    clear = first - second > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(predicted[clear], np.argmax(scores, axis=1)[clear])


@pytest.mark.parametrize("changed", [1, 5, 120, 256])
def test_a_byte_changes_no_prediction_of_itself_or_of_an_earlier_one(changed):
    data = mixed_text(np.random.default_rng(1), 257)
    other = data.copy()
    other[changed:] = as_bytes(TEXT)[: 257 - changed]
    other[changed] = 200
    codes = demo.random_codes(0)
    # Entry i predicts byte i + 1.
    before, after = (demo.predict(x, codes, BlockSizes(48, 37))[:changed] for x in (data, other))
    np.testing.assert_array_equal(before, after)


def test_encoding_shows_a_position_neither_its_byte_nor_a_later_one():
    data = mixed_text(np.random.default_rng(2), 61)
    other = data.copy()
    other[23:] = 200
    codes = demo.random_codes(0)
    before, after = demo.encode(data, codes), demo.encode(other, codes)
    np.testing.assert_array_equal(before.q[:23], after.q[:23])  # row 22 predicts byte 23
    np.testing.assert_array_equal(before.k[:24], after.k[:24])  # key 23 is of the bytes before 23
    np.testing.assert_array_equal(before.v[:23], after.v[:23])


@pytest.mark.parametrize("n", [2, 3, 8, 9, 10])
def test_texts_shorter_than_the_context_are_predicted(n):
    predicted = demo.predict(as_bytes(b"a" * n), demo.random_codes(0))
    assert predicted.tolist() == [ord("a")] * (n - 1)


def test_block_sizes_and_seed_reach_the_computation(text_file):
    data = demo.read_text(text_file, 500)
    blocks = BlockSizes(96, 1000)
    (first,), (again,), (seeded,) = (
        demo.measure(data, seed, blocks, lambda _: nullcontext()) for seed in (0, 0, 1)
    )
    assert first.tiles == BlockSizes(96, 499)  # cut to the positions
    assert first.difference == again.difference
    assert first.difference != seeded.difference


def test_measure_beats_the_baseline_and_agrees_with_jax_nn():
    steps = []

    def step(name):
        steps.append(name)
        return nullcontext()

    (result,) = demo.measure(as_bytes(TEXT), 0, None, step)
    assert steps == ["encoding", "compiling", "attention", "decoding", "comparing"]
    assert result.positions == 3000
    assert result.accuracy > 0.9
    assert result.late_accuracy > 0.98
    assert result.common == ord(" ")
    assert result.baseline == TEXT[1:].count(b" ") / 3000
    assert result.compared == 1024
    assert result.difference < 1e-4
    assert result.score_bytes == 4 * 3000**2
    assert 0 < result.temp_bytes < result.score_bytes
    assert result.gflops == pytest.approx(2 * 3000**2 * 128 / result.run_seconds / 1e9)


def test_int8_predicts_as_well():
    floats, int8 = demo.measure(
        as_bytes(TEXT), 0, None, lambda _: nullcontext(), ("float32", "int8")
    )
    assert (floats.products, int8.products) == ("float32", "int8")
    assert floats.difference < 1e-4 < int8.difference < 0.1
    assert np.mean(floats.right == int8.right) > 0.99


# --- The excerpt


def test_the_excerpt_marks_whole_characters_and_is_cut_to_the_width():
    text = "skipped\n\na\tb\x1b\n€uro 漢字".encode()
    right = np.ones(len(text), bool)
    right[text.index("€".encode()) + 1] = False  # one byte of three
    lines = demo_view.last_lines(as_bytes(text), right[1:], lines=2, columns=7)
    assert ["".join(c.text for c in line) for line in lines] == ["a b ", "€uro 漢"]
    assert [c.right for c in lines[1]] == [False, True, True, True, True, True]
    assert lines[1][-1].cells == 2


def test_a_character_cut_by_the_end_is_not_shown():
    text = "ab€".encode()[:-1]
    (line,) = demo_view.last_lines(as_bytes(text), np.ones(len(text) - 1, bool), 3, 80)
    assert [(c.text, c.right) for c in line] == [("a", False), ("b", True)]


# --- demo


def test_demo_prints_accuracy_cost_and_text(text_file, capsys):
    assert main(["demo", text_file, "--block-size", "512,640"]) == 0
    out, err = capsys.readouterr()
    table = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    table = {name: value.strip() for name, value in table.items()}
    assert float(table["bytes predicted right"].rstrip("%")) > 90
    assert float(table["baseline: always ' '"].rstrip("%")) < 30
    assert table["positions"] == "3,000"
    assert table["tiles (Q x KV)"] == "512 x 640"
    assert table["full score matrix"] == "34.3 MiB, never built"
    for name in ("compile time", "run time", "speed", "temporary memory", "difference from jax.nn"):
        assert table[name]
    assert WORDS.decode() + "^" * (len(WORDS) - 1) + "\n" in out
    # Progress and escapes are for terminals only.
    assert "..." not in out
    assert "\x1b" not in out
    assert err == ""


def test_int8_is_shown_beside_the_floats(text_file, capsys):
    assert main(["demo", text_file, "--max-bytes", "301", "--int8"]) == 0
    out = capsys.readouterr().out
    header, right = (line.split() for line in out.splitlines()[2:4])
    assert header == ["float32", "int8"]
    assert right[:3] == ["bytes", "predicted", "right"]
    assert len(right) == 5


def test_max_bytes_cuts_and_one_block_size_serves_both_axes(text_file, capsys):
    assert main(["demo", text_file, "--max-bytes", "301", "--block-size", "64"]) == 0
    out = capsys.readouterr().out
    assert "300" in out
    assert "64 x 64" in out


def test_max_bytes_may_cut_a_character(tmp_path):
    path = tmp_path / "euro.txt"
    path.write_text("€€€", encoding="utf-8")
    assert len(demo.read_text(path, 4)) == 4


def test_progress_is_printed_on_a_terminal_without_rich(text_file, capsys, monkeypatch, no_module):
    no_module("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["demo", text_file, "--max-bytes", "301"]) == 0
    out = capsys.readouterr().out
    for step in ("reading", "encoding", "compiling", "attention", "decoding", "comparing"):
        assert f"{step} ... " in out
    assert "\x1b" not in out
    assert "^" in out


def test_rich_colours_what_is_right(text_file, capsys, monkeypatch):
    pytest.importorskip("rich", reason="rich is in the extra `cli`")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["demo", text_file]) == 0
    out = capsys.readouterr().out
    assert f"\x1b[1;32m{WORDS.decode().strip()}\x1b[0m\n" in out
    assert "attention" in out
    assert "^" not in out


def test_no_color_falls_back_to_marks(text_file, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["demo", text_file, "--max-bytes", "301"]) == 0
    assert "^" in capsys.readouterr().out


def test_plot_is_written(text_file, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `plot`")
    path = tmp_path / "accuracy.png"
    assert main(["demo", text_file, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in capsys.readouterr().out


def test_plot_of_the_shortest_text_and_an_odd_name(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `plot`")
    text = tmp_path / "$a$_[red].txt"
    text.write_bytes(b"ab")
    assert main(["demo", str(text), "--plot", str(tmp_path / "out.svg")]) == 0


# --- Errors: exit code 2 and a message, before any long computation


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a", "has 1"),
        (b"ab\0cd", "NUL byte at 2"),
        (b"abc\xffdef", "UTF-8 text; {path}: invalid start byte at byte 3"),
        (b"abc\xe2\x82", "UTF-8 text; {path}: unexpected end of data at byte 3"),
    ],
)
@pytest.mark.usefixtures("no_run")
def test_what_is_no_text_is_refused(content, message, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert main(["demo", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m flash_jax demo: error: FILE must ")
    assert message.format(path=repr(str(path))) in err
    assert repr(str(path)) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["missing", ".", "", "a\0b"])
@pytest.mark.usefixtures("no_run")
def test_what_is_no_file_is_refused(name, tmp_path, capsys):
    path = str(tmp_path / name) if name else ""
    assert main(["demo", path]) == 2
    err = capsys.readouterr().err
    assert "FILE must be a readable file" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_run")
def test_an_unreadable_file_is_refused(text_file, capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    # The error is raised by hand, since permissions do not bind every user.
    monkeypatch.setattr(builtins, "open", refuse)
    assert main(["demo", text_file]) == 2
    assert f"{text_file!r}: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-bytes", "1", "must be an integer in 2..1073741824; it is '1'"),
        ("--max-bytes", "1073741825", "must be an integer in 2..1073741824"),
        ("--max-bytes", "many", "it is 'many'"),
        ("--block-size", "0", "must be N or Q,KV, integers >= 1; it is '0'"),
        ("--block-size", "abc", "it is 'abc'"),
        ("--block-size", "64,0", "it is '64,0'"),
        ("--block-size", "64,", "it is '64,'"),
        ("--block-size", "1,2,3", "it is '1,2,3'"),
        ("--seed", "-1", "must be an integer >= 0; it is '-1'"),
        ("--seed", "1.5", "it is '1.5'"),
    ],
)
@pytest.mark.usefixtures("no_run")
def test_bad_values_name_their_option(option, value, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", f"{option}={value}"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert f"argument {option}: " in err
    assert message in err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/out.png", "--plot must be a writable file"),
        ("folder.png", "--plot must be a writable file"),
        ("out.xyz", "--plot must end in one of .png, .svg, .pdf"),
        ("out", "--plot must end in one of"),
    ],
)
@pytest.mark.usefixtures("no_run")
def test_a_plot_that_cannot_be_saved_is_refused(name, message, text_file, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `plot`")
    (tmp_path / "folder.png").mkdir()
    assert main(["demo", text_file, "--plot", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_run")
def test_a_failed_run_leaves_no_empty_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `plot`")
    assert main(["demo", str(tmp_path / "missing"), "--plot", str(tmp_path / "out.png")]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_run")
def test_plot_without_matplotlib_names_what_to_install(text_file, tmp_path, capsys, no_module):
    no_module("matplotlib")
    assert main(["demo", text_file, "--plot", str(tmp_path / "out.png")]) == 2
    assert "pip install -e '.[plot]'" in capsys.readouterr().err


def test_an_interrupt_ends_without_a_traceback(text_file, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "measure", interrupt)
    assert main(["demo", text_file]) == 130


# --- info


@pytest.mark.parametrize("rich", [True, False])
def test_info_shows_versions_processor_and_tiles(rich, capsys, monkeypatch, no_module):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if rich:
        pytest.importorskip("rich", reason="rich is in the extra `cli`")
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        no_module("rich")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in ("flash_jax", "jax", "jaxlib", "numpy", "Python", "processor", "cores", "L2 cache"):
        assert name in out
    assert __version__ in out
    assert "256 bits (XLA's default)" in out
    assert "XLA_FLAGS=--xla_cpu_prefer_vector_width=512" in out
    assert "H = 128, causal" in out
    assert ("\x1b[" in out) == rich


def test_tiles_are_those_of_auto():
    from flash_jax import FlashAttentionConfig

    rows = {row[0]: row[1:] for row in info.tiles()}
    assert len(info.tile_header()) == 5
    config = FlashAttentionConfig.auto(64, 2048, 2048, causal=True)
    assert rows["2,048"][1] == f"{config.block_size_q} x {config.block_size_kv}"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "256 bits (XLA's default)"),
        ("--xla_dump_to=x", "256 bits (XLA's default)"),
        ("--a=1 --xla_cpu_prefer_vector_width=128", "128 bits (XLA_FLAGS)"),
        (
            "--xla_cpu_prefer_vector_width=128 --xla_cpu_prefer_vector_width=512",
            "512 bits (XLA_FLAGS)",
        ),
    ],
)
def test_vector_width_is_read_from_the_flags(flags, expected):
    assert info.vector_width(flags) == expected


def test_assumed_caches_are_called_so():
    rows = dict(info.caches(Machine(3, *DEFAULT_CACHES, measured=False)))
    assert rows["cores"] == "3"
    assert rows["L1 data cache, per core"].startswith("32 KiB (assumed")
    assert rows["L2 cache, per core"].startswith("1 MiB (assumed")
    rows = dict(info.caches(Machine(1, 49152, 2**21, 3 * 2**19, measured=True)))
    assert rows["L1 data cache, per core"] == "48 KiB"
    assert rows["L3 cache"] == "1.5 MiB"


def test_processor_has_a_name_where_cpuinfo_has_none(tmp_path):
    assert processor._linux_processor(tmp_path / "missing") == ""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert processor._linux_processor(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert processor.processor()


# --- The rest


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"flash_jax {__version__}\n"


def test_no_command_prints_help_and_exits_2(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "demo" in err
    assert "info" in err


def test_an_unknown_command_exits_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["dance"])
    assert exit_.value.code == 2
    assert "dance" in capsys.readouterr().err


def test_the_module_runs_and_the_package_does_not_import_it():
    code = (
        "import sys, flash_jax; print([m for m in sys.modules if m.startswith("
        "('rich.', 'matplotlib.', 'flash_jax._cli', 'flash_jax.__main__'))])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout == "[]\n", loaded.stderr
    command = [sys.executable, "-m", "flash_jax"]
    assert subprocess.run([*command, "--version"], capture_output=True).returncode == 0
    assert subprocess.run([*command, "demo", "missing"], capture_output=True).returncode == 2
