"""What a training shows while it runs: a bar in a terminal, a few lines anywhere else."""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

# Without tqdm's rate, which would push the numbers below out of 80 columns.
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
# Lines per run where there is no terminal: enough to see that it is alive, few enough for a log.
_LINES = 20


class Progress:
    """Steps done, loss, gradient norm, tokens per second and the time left.

    Args:
        steps: steps of the whole run.
        done: steps that were completed before, by the run that this one resumes.
        stream: where to write; None means stderr.
        clock: seconds since some moment; the time left is estimated from it.
    """

    def __init__(
        self,
        steps: int,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._first = steps, done
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._start = clock, clock()
        self._every = max(1, -(-steps // _LINES))
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=steps,
                initial=done,
                file=self._stream,
                dynamic_ncols=True,
                bar_format=_BAR,
            )

    def update(self, line: Mapping[str, float]) -> None:
        """Show one training step, a line of metrics.jsonl."""
        step = int(line["step"])
        if self._bar is not None:
            self._bar.set_postfix_str(_numbers(line), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._every == 0 or step in (self._first + 1, self._steps):
            width = len(str(self._steps))
            self.note(
                f"step {step:>{width}}/{self._steps}, {_numbers(line)}, ETA {self._left(step)}"
            )

    def note(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _left(self, step: int) -> str:
        per_step = (self._clock() - self._start) / (step - self._first)
        return tqdm.format_interval(per_step * (self._steps - step))


def _numbers(line: Mapping[str, float]) -> str:
    return (
        f"loss {line['loss']:.4f}, grad norm {line['grad_norm']:.3g}, "
        f"{line['tokens_per_s']:,.0f} tokens/s"
    )
