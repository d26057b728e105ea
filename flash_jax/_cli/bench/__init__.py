"""``python -m flash_jax bench``: speed beside what a user would pick instead, on this machine.

cases      shapes that models meet
peers      attention of PyTorch, ONNX Runtime and OpenVINO
subjects   what runs a case: this library, ``jax.nn`` and the peers
measure    alternating rounds, and what the machine could do at best
report     the table, JSON and a figure

Nothing of it is imported by ``import flash_jax``.
"""
