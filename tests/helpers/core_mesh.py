"""One device per core, in a process that has made none yet: see ``test_core_mesh.py``.

python tests/helpers/core_mesh.py
"""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import flash_jax
from flash_jax._machine.processor import cores_here, machine


def main():
    everyone = cores_here()
    mesh = flash_jax.core_mesh(3 * everyone, axis_name="x")
    assert dict(mesh.shape) == {"x": 3 * everyone}
    assert mesh.devices.tolist() == jax.devices("cpu")
    assert machine().cores == 1
    x = jax.device_put(np.ones((3 * everyone, 2)), NamedSharding(mesh, PartitionSpec("x")))
    assert {shard.data.shape for shard in x.addressable_shards} == {(1, 2)}
    assert flash_jax.core_mesh(3 * everyone, axis_name="x") == mesh
    assert flash_jax.core_mesh(2).devices.tolist() == jax.devices("cpu")[:2]
    assert flash_jax.core_mesh().size == 3 * everyone  # jax_num_cpu_devices says so
    try:
        flash_jax.core_mesh(3 * everyone + 1)
    except RuntimeError as error:
        print(error)


if __name__ == "__main__":
    main()
