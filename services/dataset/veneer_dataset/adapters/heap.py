"""The C library's heap, told to keep memory that was freed: a page that comes back from the kernel is cleared first."""

import ctypes

_KEPT_BYTES = 16 << 20  # a heap, of which the C library has a few
_SHARED_BYTES = 8 << 20  # from that size on, each allocation has pages of its own
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def keep_freed_memory() -> None:
    """Keeps some megabytes for what comes and goes, such as messages of a MiB. Does nothing where there is no mallopt.

    Raises:
        RuntimeError: the C library refused.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value in ((_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_MMAP_THRESHOLD, _SHARED_BYTES)):
        if not mallopt(parameter, value):
            raise RuntimeError(f"mallopt({parameter}, {value}) failed")
