"""The command ``info``."""

import pytest

from flash_jax import __version__
from flash_jax.__main__ import main
from flash_jax._cli import info
from flash_jax._machine import processor
from flash_jax._machine.processor import DEFAULT_CACHES, Machine


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


def test_more_cores_than_devices_are_told():
    assert info.devices(2, 2) == info.devices(1, 2) == "2"
    assert info.devices(3, 2).startswith("2 for 3 cores: flash_jax.core_mesh()")


def test_processor_has_a_name_where_cpuinfo_has_none(tmp_path):
    assert processor._linux_processor(tmp_path / "missing") == ""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert processor._linux_processor(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert processor.processor()
