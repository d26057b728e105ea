"""Attention on 4 devices gives what it gives on one, with its derivatives."""

import re

import pytest
from processes import run_script
from unoptimized import ENVIRONMENT


def check(*table):
    printed = run_script("mesh_table.py", *table, devices=4, **ENVIRONMENT)
    assert re.fullmatch(r"(\d+) of \1 passed\n", printed), printed[-4000:]


@pytest.mark.parametrize("table", ["jit", "shard_map", "meshes"])
def test_the_mesh_table(table):
    """``jit`` gathers nothing that it need not, and nothing more is communicated than is stated."""
    check(table)


@pytest.mark.thorough
@pytest.mark.parametrize("table", ["jit", "shard_map", "meshes"])
def test_the_rest_of_the_mesh_table(table):
    check(table, "thorough")
