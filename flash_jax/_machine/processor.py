"""What the machine offers: cores and cache sizes, as its operating system tells them."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from .._tiles.jax_versions import ONE_KERNEL, cpu_devices

_CPUINFO = Path("/proc/cpuinfo")
_LINUX_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_SUFFIXES = {"K": 2**10, "M": 2**20, "G": 2**30}


class Machine(NamedTuple):
    """Bytes are per core for L1 and L2, shared for L3; 0 where the machine has none."""

    cores: int  # of one of JAX's CPU devices
    l1: int
    l2: int
    l3: int
    measured: bool  # False: the cache sizes are the documented defaults
    bfloat16: bool = False  # whether it has instructions that multiply bfloat16
    one_kernel: bool = False  # whether XLA makes one kernel of a tile


# A small x86 or Arm core of today.
DEFAULT_CACHES = (32 * 2**10, 2**20, 0)


def machine() -> Machine:
    """This machine, as one of JAX's CPU devices has it."""
    here = _read()
    return here._replace(cores=max(1, here.cores // cpu_devices()))


def cores_here() -> int:
    """Cores that this process may use."""
    return _read().cores


@functools.cache
def _read() -> Machine:
    """This machine, read once per process."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    caches = _darwin_caches() if platform.system() == "Darwin" else _linux_caches(_LINUX_CACHES)
    measured = bool(caches.get(1) and caches.get(2))
    sizes = (caches[1], caches[2], caches.get(3, 0)) if measured else DEFAULT_CACHES
    return Machine(cores, *sizes, measured, _multiplies_bfloat16(_CPUINFO), ONE_KERNEL)


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


def _multiplies_bfloat16(cpuinfo: Path) -> bool:
    """Whether Linux lists such instructions of x86, the ones that XLA is known to use."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return False
    return bool(flags and {"avx512_bf16", "amx_bf16"} & set(flags[1].split()))


@functools.cache
def processor() -> str:
    """Its name, or at least its architecture."""
    names = _darwin_processor() if platform.system() == "Darwin" else _linux_processor(_CPUINFO)
    return names or platform.processor() or platform.machine() or "unknown"


def _linux_processor(cpuinfo: Path) -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return ""
    return found[1].strip() if found else ""


def _darwin_processor() -> str:
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""


def _darwin_caches() -> dict[int, int]:
    sizes = {}
    for level, name in ((1, "hw.l1dcachesize"), (2, "hw.l2cachesize"), (3, "hw.l3cachesize")):
        try:
            printed = subprocess.run(["sysctl", "-n", name], capture_output=True, timeout=5).stdout
            sizes[level] = int(printed)
        except (OSError, ValueError, subprocess.SubprocessError):
            continue
    return sizes
