"""What the machine offers: cores and cache sizes, as its operating system tells them."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

_LINUX_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_SUFFIXES = {"K": 2**10, "M": 2**20, "G": 2**30}


class Machine(NamedTuple):
    """Bytes are per core for L1 and L2, shared for L3; 0 where the machine has none."""

    cores: int
    l1: int
    l2: int
    l3: int
    measured: bool  # False: the cache sizes are the documented defaults


# A small x86 or Arm core of today.
DEFAULT_CACHES = (32 * 2**10, 2**20, 0)


@functools.cache
def machine() -> Machine:
    """This machine, read once per process."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    caches = _darwin_caches() if platform.system() == "Darwin" else _linux_caches(_LINUX_CACHES)
    if caches.get(1) and caches.get(2):
        return Machine(cores, caches[1], caches[2], caches.get(3, 0), measured=True)
    return Machine(cores, *DEFAULT_CACHES, measured=False)


def _linux_caches(folder: Path) -> dict[int, int]:
    """Bytes of the data caches by level; empty where the folder or a file can't be read."""
    sizes = {}
    try:
        for index in sorted(folder.glob("index*")):
            if (index / "type").read_text().strip() != "Instruction":
                size = (index / "size").read_text().strip()
                bytes_ = int(size.rstrip("KMG")) * _SUFFIXES.get(size[-1:], 1)
                sizes[int((index / "level").read_text())] = bytes_
    except (OSError, ValueError):
        return {}
    return sizes


def _darwin_caches() -> dict[int, int]:
    sizes = {}
    for level, name in ((1, "hw.l1dcachesize"), (2, "hw.l2cachesize"), (3, "hw.l3cachesize")):
        try:
            printed = subprocess.run(["sysctl", "-n", name], capture_output=True, timeout=5).stdout
            sizes[level] = int(printed)
        except (OSError, ValueError, subprocess.SubprocessError):
            continue
    return sizes
