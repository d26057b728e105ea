"""One CPU device per core."""

import pytest
from processes import run_script

from flash_jax import core_mesh
from flash_jax._machine.processor import cores_here


def test_a_device_per_core_is_made_at_the_start_and_not_later():
    printed = run_script("core_mesh.py")
    count = 3 * cores_here()
    assert printed.startswith("core_mesh must be called before JAX makes its devices")
    assert f"it has made {count}, not {count + 1}" in printed
    assert f"JAX_NUM_CPU_DEVICES={count + 1}" in printed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cores": 0}, ValueError, "cores must be > 0; it is 0"),
        ({"cores": 1.0}, TypeError, "cores must be an integer"),
        ({"axis_name": 3}, TypeError, "axis_name must be a string; it is 3"),
    ],
)
def test_an_error_names_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        core_mesh(**arguments)
