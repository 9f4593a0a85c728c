"""What the machine has: cores, memory, bf16 arithmetic; and how much of its memory a process uses."""

import os
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # its stubs are a package of their own

_CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory_bytes() -> int:
    """Memory that can be used without swapping, within the bound of this process's control group."""
    free: int = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def has_bf16() -> bool:
    """Whether the CPU computes in bf16, so that a base is held in it."""
    flags = _cpu_flags()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def has_avx2() -> bool:
    """Whether the CPU multiplies float32 by sixteen bits, so that a replica holds in them what is stored in them."""
    return "avx2" in _cpu_flags()


def _cpu_flags() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def cpu_s(pid: int) -> float:
    """Time on cores that a process and its children have taken, in seconds; 0 when it is gone."""
    total = 0.0
    try:
        process = psutil.Process(pid)
        own = process.cpu_times()
        total = float(own.user + own.system + own.children_user + own.children_system)
        for child in process.children(recursive=True):
            times = child.cpu_times()
            total += float(times.user + times.system)
    except psutil.Error:
        return total
    return total


def memory_bytes(pid: int) -> int:
    """Resident memory of a process and of all that it started; 0 when it is gone."""
    total = 0
    try:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            try:
                total += each.memory_info().rss
            except psutil.Error:
                continue
    except psutil.Error:
        return 0
    return total
