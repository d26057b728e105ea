"""Which subjects are installed, in this Python or in another."""

from __future__ import annotations

import contextlib
import platform
import tempfile
from pathlib import Path

from ..inputs import InputError
from .processes import Worker, WorkerError
from .subjects import SUBJECTS, TORCH, Entry, versions

_OPTION = "--torch-python"


def available(torch_python: str | None = None) -> tuple[dict[str, Entry], dict[str, str]]:
    """Lists the subjects that are installed, and the versions of the peers.

    Args:
        torch_python: another Python to run PyTorch's subject with; None means this one.

    Returns:
        Subjects by name; and versions by module, "not installed" among them.

    Raises:
        InputError: torch_python can't be started, or lacks torch or numpy.
    """
    needed = tuple(dict.fromkeys(need for entry in SUBJECTS.values() for need in entry.needs))
    found = versions(needed)
    texts = {module: version or "not installed" for module, version in found.items()}
    subjects = {
        name: entry for name, entry in SUBJECTS.items() if all(found[need] for need in entry.needs)
    }
    if torch_python is not None:
        entry = SUBJECTS[TORCH]._replace(python=torch_python)
        texts["torch"] = _version_of_torch(entry)
        # In the order of the list, whether or not this Python has PyTorch, too.
        chosen = subjects | {TORCH: entry}
        subjects = {name: chosen[name] for name in SUBJECTS if name in chosen}
    return subjects, texts


def _version_of_torch(entry: Entry) -> str:
    """Asks another Python for its version of PyTorch."""
    wanted = f"{_OPTION} must be a Python that has torch and numpy; {entry.python!r}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with contextlib.closing(Worker(entry, Path(folder) / "log")) as worker:
                found = worker.ask({"versions": entry.needs})
        except WorkerError as error:
            raise InputError(f"{wanted}: {error}") from error
    torch, python = found["torch"], found["Python"]
    if torch is None:
        raise InputError(f"{wanted}: it has no torch")
    return torch if python == platform.python_version() else f"{torch} (Python {python})"
