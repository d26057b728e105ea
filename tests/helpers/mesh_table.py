"""Attention on 4 devices, beside that on one: run by ``test_partition.py``.

python tests/helpers/mesh_table.py jit|meshes|shard_map [thorough]

It prints what fails, then how many checks passed. Each table has its rows of the default tier, and
the rest of their products for the thorough one.
"""

import sys
import traceback

import cached_on_devices
import jax
import mesh_contexts
import mesh_memory
import partitioned
import sharded
from garbage import collect_seldom

TABLES = {
    "jit": (partitioned, mesh_memory),
    "meshes": (mesh_contexts,),
    "shard_map": (sharded, cached_on_devices),  # two short ones in one process
}


def main(table, tier="default"):
    collect_seldom()
    assert jax.device_count() == 4
    checks = [x for module in TABLES[table] for x in module.checks(tier == "thorough")]
    passed = 0
    for name, check in checks:
        try:
            check()
            passed += 1
        except Exception:
            print(f"{name}:", traceback.format_exc()[-1500:])
    print(f"{passed} of {len(checks)} passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
