"""``python -m flash_jax bench`` measures speed beside what a user would pick instead.

cases      the shapes that are measured, as models have them
peers      attention of PyTorch, ONNX Runtime and OpenVINO
subjects   what runs a case: this library, ``jax.nn`` and the peers
measure    all subjects in alternating rounds, and what the machine could do at best
report     the table, JSON and a figure

``import flash_jax`` imports none of these modules.
"""
