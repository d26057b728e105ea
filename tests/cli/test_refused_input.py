"""Input that is refused: exit code 2 and a message, before any long computation."""

import builtins

import pytest

from flash_jax.__main__ import main
from flash_jax._cli import demo


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
