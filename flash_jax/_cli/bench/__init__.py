"""``python -m flash_jax bench`` measures speed beside what a user would pick instead.

cases         the shapes that are measured, as models have them
exact         their inputs, and some rows of what must come out, in float64
jax_subjects  this library and ``jax.nn``, and what the machine could do at best
peers         attention of PyTorch, ONNX Runtime and OpenVINO
subjects      the list of all these: what each can do, and what it needs
worker        the process in which one subject runs one case
processes     starts workers, talks to them, and puts them to sleep
measure       all subjects on one case, in alternating rounds
report        the table, JSON and a figure

``import flash_jax`` imports none of these modules. A worker of a peer may be a Python without JAX:
cases, exact, peers, subjects and worker import NumPy alone.
"""
