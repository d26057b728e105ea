"""Under ``shard_map`` every path gives what it gives unsharded, with its derivatives."""

import pytest
from paths import PATHS
from processes import run_script
from sharded import LONG


@pytest.mark.parametrize(
    ("length", "meshes", "paths"),
    [("long", 2, LONG[:2]), ("long", 2, LONG[2:]), ("short", 3, PATHS)],
    ids=["long", "others that are long", "short"],
)
def test_every_path_under_shard_map(length, meshes, paths):
    """Forward, tangent and gradients; by batch, by heads and over a part of the mesh."""
    printed = run_script("sharded.py", length, *paths, devices=4)
    assert printed == f"{meshes * len(paths)} passed\n", printed[-4000:]
