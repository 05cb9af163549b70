"""The peak memory of a block of code, for the benchmarks that report it."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Self


class PeakMemory:
    """Peak bytes that the block adds to what was held before it: in the GPU's allocator, else in the process."""

    def __enter__(self) -> Self:
        """Note what is held now, and start to watch the memory."""
        import torch

        self.cuda, self.peak, self.done = torch.cuda.is_available(), 0, threading.Event()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # returns freed memory, which would count as held before
        self.before = resident()
        self.watch = threading.Thread(target=self._watch)
        self.watch.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, resident() - self.before)

    def __exit__(self, *exception: object) -> None:
        """Stop watching, and set `peak`."""
        import torch

        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated() - self.before
        else:
            self.done.set()
            self.watch.join()


def resident() -> int:
    """Return the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
