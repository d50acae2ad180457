"""Running with hardly more GPU memory than is needed, beside somebody who takes what is free."""

import contextlib
import gc
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

# Of what a case took without a limit; widened whenever it was too little, by as much or a quarter.
MARGIN = 0.05
MOST_MARGIN = 10.0  # streams share no free memory, and a small case leaves holes as large as itself
# Bits of the largest number of float32 numbers that are taken.
_MOST_TAKEN = {"cuda": 24, "cpu": 12}


class Thief:
    """Takes memory on one of several streams, fills it with NaN, and gives it back.

    What somebody still reads after it was freed has other bits then.

    Args:
        device: whose memory.
        streams: of the device, one at random each time; None among them is the current one, and
            the only one of a CPU.
    """

    def __init__(self, device: torch.device, streams: Sequence[Any]) -> None:
        self._device = device
        self._streams, self._random = tuple(streams), random.Random(0)
        self.active = False
        self.refused = 0
        """How often there was not enough."""

    def take(self) -> None:
        """Once, every other time, and only while ``active``.

        All sizes are as likely: small ones are served from memory that was just freed, and large
        ones let the allocator give back what is cached, which waits for the whole GPU.
        """
        if not self.active or self._random.random() < 0.5:
            return
        size = int(2 ** self._random.uniform(0, _MOST_TAKEN[self._device.type]))
        with torch.cuda.stream(self._random.choice(self._streams)):
            try:
                torch.full((size,), torch.nan, device=self._device)
            except torch.OutOfMemoryError:
                self.refused += 1

    def observe(self, function: Callable[..., Any], *operands: Any, **settings: Any) -> Any:
        """An ``Observer``: takes before the function runs."""
        self.take()
        return function(*operands, **settings)


class Pressure:
    """Lets a case have what it needs and a margin, and no more. Without a GPU there is no limit.

    The limit counts the allocator's segments, with the holes in them.

    Args:
        make: makes what runs a case, anew after it ran out of memory.
        thief: who is active while there is a limit.

    Attributes:
        margin: of what the case took at its peak, in the end.
        out_of_memory: how often the margin was too little.
    """

    def __init__(self, make: Callable[[], Callable[[], Any]], thief: Thief) -> None:
        self._make, self._thief = make, thief
        self._run = make()
        self.margin = MARGIN
        self.out_of_memory = 0
        self._needs = 0
        self._run()  # compiles, and makes what stays: gradients and libraries' workspaces
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self._run()
            torch.cuda.synchronize()
            self._needs = torch.cuda.max_memory_allocated() - before

    def __call__(self) -> Any:
        """What the case returns.

        Raises:
            torch.OutOfMemoryError: not even with ``MOST_MARGIN``.
        """
        while True:
            try:
                with self._limited():
                    return self._run()
            except torch.OutOfMemoryError:
                self.out_of_memory += 1
                self.margin += max(MARGIN, self.margin / 4)
                if self.margin > MOST_MARGIN:
                    raise
            # The traceback is gone, and with it what it held.
            del self._run
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            self._run = self._make()

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        self._thief.active = True
        try:
            if not torch.cuda.is_available():
                yield
                return
            _, total = torch.cuda.mem_get_info()
            limit = torch.cuda.memory_allocated() + self._needs * (1 + self.margin)
            torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0))
            try:
                yield
                torch.cuda.synchronize()
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
        finally:
            self._thief.active = False


def allocation_retries() -> int:
    """How often this process had to give cached memory back to get other memory."""
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.memory_stats()["num_alloc_retries"])
