"""Attention on 4 devices, beside that on one: run by ``test_partition.py``.

python tests/helpers/mesh_table.py jit|meshes|caches|shard_map

It prints what fails, then how many checks passed.
"""

import sys
import traceback

import cached_on_devices
import jax
import mesh_contexts
import partitioned
import sharded

TABLES = {
    "jit": partitioned.checks,
    "meshes": mesh_contexts.checks,
    "caches": cached_on_devices.checks,
    "shard_map": sharded.checks,
}


def main(table):
    assert jax.device_count() == 4
    checks = list(TABLES[table]())
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
