"""Tiles of a problem: those that ``tune`` measured here, else those of the rule.

What was measured is kept as JSON in the user's cache folder, in a file per version of this package
and of jaxlib, under the name of the processor: other versions and other machines that share the
folder have their own. A file that can't be read, or is no such file, counts as empty.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._tiles.axis import BlockSizes
from .._version import __version__
from .processor import Machine, machine, processor
from .tile_rule import Problem, fastest_blocks

Choices = dict[Problem, BlockSizes]
Rule = Callable[[Machine, Problem], BlockSizes]

_loaded: Choices | None = None  # None: not read yet
_changes = 0


def best_blocks(problem: Problem, rule: Rule = fastest_blocks) -> BlockSizes:
    """The tiles to use for a problem: those that are stored, else those of a rule."""
    return stored().get(_key(problem)) or rule(machine(), problem)


def tuned() -> int:
    """A number that changes with the stored choices."""
    return _changes


def stored() -> Choices:
    """The choices for this processor, read once per process."""
    global _loaded
    if _loaded is None:
        _loaded = _of_this_processor(_read(path()))
    return _loaded


def store(problem: Problem, blocks: BlockSizes) -> None:
    """Keeps a choice for this process, and in the file; warns where that can't be written."""
    global _loaded, _changes
    file = path()
    try:
        content = _read(file)
        choices = _of_this_processor(content) | {_key(problem): blocks}
        content[_here()] = [{**k._asdict(), "block_sizes": [*b]} for k, b in choices.items()]
        _write(file, json.dumps(content, indent=1))
    except OSError as error:
        choices = stored() | {_key(problem): blocks}
        warnings.warn(f"the choice lasts for this process only: {error}", stacklevel=3)
    _loaded, _changes = choices, _changes + 1


def path() -> Path:
    """Where choices are kept: ``XDG_CACHE_HOME``, or the system's folder for caches."""
    system, home = platform.system(), Path(os.path.expanduser("~"))  # which never fails
    folder = {
        "Darwin": home / "Library/Caches",
        "Windows": Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local"),
    }.get(system, home / ".cache")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or folder)
    versions = f"{__version__}-jaxlib-{version('jaxlib')}"
    return folder / "flash_jax" / f"tiles-{versions}.json"


def _key(problem: Problem) -> Problem:
    """Tiles are chosen for any number of heads: a config knows of none."""
    return problem._replace(heads=1)


def _here() -> str:
    return f"{processor()}, {machine().cores} cores"


def _read(file: Path) -> dict[str, Any]:
    """What a file holds: lists of choices by processor."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"tuned tiles are not used, {file} can't be read: {error}", stacklevel=2)
        return {}
    try:
        content = json.loads(text)
        for choices in content.values():
            _parsed(choices)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        warnings.warn(f"tuned tiles are not used, {file} is damaged: {error!r}", stacklevel=2)
        return {}
    return content


def _of_this_processor(content: dict[str, Any]) -> Choices:
    return _parsed(content.get(_here(), []))


def _parsed(choices: list[dict[str, Any]]) -> Choices:
    """Checked choices, or an error."""
    parsed = {}
    for choice in choices:
        q, kv = choice["block_sizes"]
        if not (isinstance(q, int) and isinstance(kv, int) and q > 0 and kv > 0):
            raise ValueError(f"block_sizes are {choice['block_sizes']}")
        parsed[Problem(*(choice[name] for name in Problem._fields))] = BlockSizes(q, kv)
    return parsed


def _write(file: Path, text: str) -> None:
    """Replaces a file as a whole: whoever reads it sees the old text or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as temporary:
            temporary.write(text)
        Path(name).replace(file)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
