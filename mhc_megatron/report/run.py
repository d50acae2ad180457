"""A run as the reports see it: everything that its folder holds, read once."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mhc_megatron.errors import UserError
from mhc_megatron.report.curves import Curve, peak, tail_mean
from mhc_megatron.report.metrics import (
    GAINS_FILE,
    METRICS_FILE,
    RUN_FILE,
    RunInfo,
    read_gains,
    read_metrics,
    read_run,
)
from mhc_megatron.report.rollbacks import Rollback, read_rollbacks

Kind = Literal["single", "composite"]
Measure = Literal["forward", "backward", "log_column"]

# The final training loss is a mean over this share of the steps: one batch is too noisy.
TAIL = 0.05


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory.

    Attributes:
        folder: the run directory.
        info: run.json; None if there is none.
        metrics: lines of metrics.jsonl.
        probes: lines of gains.jsonl.
        notes: what a reader should know about the files.
        rollbacks: steps that were left out.
    """

    folder: Path
    info: RunInfo | None
    metrics: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    notes: list[str]
    rollbacks: list[Rollback] = field(default_factory=list)

    def curve(self, key: str) -> Curve:
        """The values of a metric at the steps that have one."""
        lines = [line for line in self.metrics if line.get(key) is not None]
        return Curve(
            steps=[line["step"] for line in lines], values=[float(line[key]) for line in lines]
        )

    def gain_curve(self, kind: Kind, measure: Measure) -> Curve:
        """The maximum over depth of a gain magnitude, per probe."""
        return Curve(
            steps=[probe["step"] for probe in self.probes],
            values=[peak(probe[kind][measure]) for probe in self.probes],
        )

    @property
    def residual(self) -> str | None:
        """``model.residual`` of the configuration, if that is known."""
        model = self.info.config.get("model", {}) if self.info else {}
        return model.get("residual")

    def without_gains(self) -> str:
        """Why there are no gains to show."""
        if self.residual == "plain":
            return (
                "This run uses Megatron's plain residual connection: it has no residual mappings, "
                "and its gain is 1 at every depth by construction."
            )
        return "No probe of the residual mappings has been recorded; validations record them."


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers that tables show; None where a run has no such number.

    Attributes:
        name: what the tables call the run.
        steps: steps done.
        train_loss: mean over the last 5 % of the steps, nats per token.
        valid_loss: at the last validation.
        gain_forward, gain_backward, log_column: of the composite mappings, the maximum over depth
            and training.
        step_ms: median.
        tokens_per_s: median.
        joules_per_token, gpu_busy: medians; None where NVML did not tell.
    """

    name: str
    steps: int
    train_loss: float | None
    valid_loss: float | None
    gain_forward: float | None
    gain_backward: float | None
    log_column: float | None
    step_ms: float | None
    tokens_per_s: float | None
    joules_per_token: float | None = None
    gpu_busy: float | None = None


def load_run(folder: Path | str) -> Run:
    """Read a run directory.

    Raises:
        UserError: no such folder, no or empty metrics, or a file that cannot be read.
    """
    folder = Path(folder)
    metrics, gains = read_metrics(folder), read_gains(folder)
    notes = [
        f"The last line of {name} was cut off, as by a killed run, and is left out."
        for name, found in ((METRICS_FILE, metrics), (GAINS_FILE, gains))
        if found.truncated
    ]
    info = read_run(folder) if (folder / RUN_FILE).is_file() else None
    if info is None:
        notes.append(f"There is no {RUN_FILE}: configuration and versions are unknown.")
    for number, probe in enumerate(gains.lines, start=1):
        _check_probe(folder / GAINS_FILE, number, probe)
    return Run(
        folder=folder,
        info=info,
        metrics=metrics.lines,
        probes=gains.lines,
        notes=notes,
        rollbacks=read_rollbacks(folder),
    )


def summarise(name: str, run: Run) -> Summary:
    """The table's numbers of a run."""
    train, valid = run.curve("loss"), run.curve("valid_loss")
    return Summary(
        name=name,
        steps=max(line["step"] for line in run.metrics),
        train_loss=tail_mean(train, share=TAIL) if len(train) else None,
        valid_loss=valid.values[-1] if len(valid) else None,
        gain_forward=_peak(run.gain_curve("composite", "forward")),
        gain_backward=_peak(run.gain_curve("composite", "backward")),
        log_column=_peak(run.gain_curve("composite", "log_column")),
        step_ms=_median(run.curve("step_ms")),
        tokens_per_s=_median(run.curve("tokens_per_s")),
        joules_per_token=_median(run.curve("joules_per_token")),
        gpu_busy=_median(run.curve("gpu_busy")),
    )


def _peak(curve: Curve) -> float | None:
    return peak(curve.values) if len(curve) else None


def _median(curve: Curve) -> float | None:
    return statistics.median(curve.values) if len(curve) else None


def _check_probe(path: Path, number: int, probe: dict[str, Any]) -> None:
    """Every list must be there and as long as the list of sublayers."""
    length = len(probe.get("sublayers", ()))
    for kind in ("single", "composite"):
        for measure in ("forward", "backward", "log_column"):
            if not length or len(probe.get(kind, {}).get(measure, ())) != length:
                raise UserError(
                    f"{str(path)!r}, line {number}: {kind}.{measure} does not have one number "
                    "per sublayer; remove the line"
                )
