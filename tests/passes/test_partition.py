"""Attention on 4 devices gives what it gives on one, with its derivatives."""

import re

import pytest
from processes import run_script


@pytest.mark.parametrize("table", ["jit", "shard_map", "meshes", "caches"])
def test_the_mesh_table(table):
    """``jit`` gathers nothing that it need not, and nothing more is communicated than is stated."""
    printed = run_script("mesh_table.py", table, devices=4)
    assert re.fullmatch(r"(\d+) of \1 passed\n", printed), printed[-4000:]
