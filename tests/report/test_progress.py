"""What a training shows: golden lines without a terminal, a bar in one."""

import io

from mhc_megatron.report.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Half a second passes per step."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(stream: io.StringIO, *, steps: int, done: int = 0, stop: int | None = None) -> str:
    clock = Clock()
    with Progress(steps, done=done, stream=stream, clock=clock) as progress:
        for step in range(done + 1, (stop or steps) + 1):
            clock.now += 0.5
            progress.update(
                {"step": step, "loss": 6 / step, "grad_norm": 1.2345, "tokens_per_s": 12_345.6}
            )
    return stream.getvalue()


def test_lines_without_a_terminal() -> None:
    assert run(io.StringIO(), steps=60, stop=7) == (
        "step  1/60, loss 6.0000, grad norm 1.23, 12,346 tokens/s, ETA 00:29\n"
        "step  3/60, loss 2.0000, grad norm 1.23, 12,346 tokens/s, ETA 00:28\n"
        "step  6/60, loss 1.0000, grad norm 1.23, 12,346 tokens/s, ETA 00:27\n"
    )


def test_about_twenty_lines_for_any_length() -> None:
    for steps in (1, 5, 20, 21, 150, 100_000):
        lines = run(io.StringIO(), steps=steps).splitlines()
        assert min(steps, 10) <= len(lines) <= 22
        assert lines[-1].startswith(f"step {steps}/{steps},") and lines[-1].endswith("ETA 00:00")


def test_the_time_left_of_a_resumed_run_counts_its_own_steps() -> None:
    lines = run(io.StringIO(), steps=100, done=90).splitlines()
    assert lines[0].startswith("step  91/100") and lines[0].endswith("ETA 00:04")


def test_a_bar_in_a_terminal() -> None:
    text = run(Terminal(), steps=40, done=30)
    last = text.split("\r")[-1]
    assert last.startswith("100%|") and "| 40/40 [" in last
    assert last.endswith("loss 0.1500, grad norm 1.23, 12,346 tokens/s\n")


def test_notes_stand_on_their_own_lines() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        with Progress(10, stream=stream) as progress:
            progress.note("validation loss 2.5")
    assert plain.getvalue() == "validation loss 2.5\n"
    assert "\rvalidation loss 2.5\n" in terminal.getvalue()
