"""The command ``demo``: what it prints and draws."""

import sys

import pytest
from texts import WORDS

from flash_jax.__main__ import main
from flash_jax._cli import demo


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
