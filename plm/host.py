"""What a process that computes asks of its host: memory that stays, and compiled programs that are found again."""

import ctypes
import os
import re
import sys
from pathlib import Path

# glibc's parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
KEPT_PROGRAM_BYTES = 2 << 30


def keep_memory() -> bool:
    """Lets the allocator keep freed memory instead of giving it back; returns whether it does so (glibc only).

    XLA allocates a program's temporaries anew in every step on CPU, and glibc gives blocks of that size back to the
    kernel each time, which then has to clear every page again: 78,000 page faults and 200 ms of 780 ms CPU time for a
    step of elmo.py:tiny, 0 and 7 ms of 510 ms with this. Peak memory grows by a fifth. To be called before JAX is
    imported, as it holds for one pool of memory and threads that are there already have theirs. Whoever sets glibc's
    own variables (MALLOC_*, GLIBC_TUNABLES) keeps them.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has none
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


def peak_memory() -> dict[str, int]:
    """Bytes: `process`, the most that this process has held in RAM, and `device`, the most that any of its devices has
    allocated; each where the system or JAX tells (of CPUs JAX does not: their arrays are the process's own memory)."""
    import jax

    peak = {}
    try:
        # Not getrusage's figure, which a process takes over from the one that started it.
        status = Path("/proc/self/status").read_text()
        peak["process"] = 1024 * int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[1])
    except (OSError, TypeError):  # not Linux
        pass
    devices = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return peak | ({"device": max(devices)} if any(devices) else {})


def keep_programs() -> None:
    """Keeps compiled programs in the cache folder, so that the second start of a run need not compile.

    JAX finds a program by its code, its shapes, the devices and the versions; the least used are dropped beyond 2 GiB.
    Whoever has chosen a folder (JAX_COMPILATION_CACHE_DIR) keeps it, with JAX's other settings.
    """
    import jax

    from plm.cache import cache_directory

    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "programs"))
    jax.config.update("jax_compilation_cache_max_size", KEPT_PROGRAM_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
