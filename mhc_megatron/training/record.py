"""Everything that people look at, written by rank 0 while a run trains."""

import contextlib
import math
import platform
import statistics
from pathlib import Path
from types import TracebackType
from typing import Any

import megatron.core
import torch

from mhc_megatron.gains import gain_magnitudes
from mhc_megatron.megatron.attention import attention_kernels
from mhc_megatron.report.curves import peak
from mhc_megatron.report.html import layout_text, write_report
from mhc_megatron.report.metrics import MetricsLog, RunInfo, write_run
from mhc_megatron.report.pipeline import forget_execution, write_execution
from mhc_megatron.report.progress import Progress
from mhc_megatron.report.rollbacks import Rollback
from mhc_megatron.report.tensorboard import TensorBoardLog
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import config_dict
from mhc_megatron.training.pipeline import pipeline_schedule
from mhc_megatron.training.probe import Mappings
from mhc_megatron.training.trainer import StepMetrics

UNFUSED = (
    "Transformer Engine computes attention without a fused kernel, several times slower than with "
    "one; NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 says why, docs/install.md what to do"
)


class RunRecord:
    """Progress bar, metrics, gains, TensorBoard scalars, run.json and the final report.

    Args:
        config: the run; everything goes into ``config.out``.
        parameters: of the whole model.
        done: completed steps, more than 0 when the run resumes.
        enabled: False on every rank but the first, where all calls do nothing.
    """

    def __init__(self, config: TrainConfig, *, parameters: int, done: int, enabled: bool) -> None:
        self._config, self._parameters, self._done = config, parameters, done
        self._enabled = enabled
        self._folder = Path(config.out)
        self._step_ms: list[float] = []
        self._loss = self._valid_loss = math.nan
        self._stopped_after: int | None = None

    def __enter__(self) -> "RunRecord":
        if self._enabled:
            self._open = contextlib.ExitStack()
            self._write_status("running")
            if not self._done:
                forget_execution(self._folder)
            self._logs = self._open.enter_context(contextlib.ExitStack())
            self._open_logs(self._done)
            self._progress = self._open.enter_context(Progress(self._config.steps, done=self._done))
            self._progress.note(self._opening())
        return self

    def step(self, step: int, metrics: StepMetrics) -> None:
        """Record a training step; ``step`` counts completed steps."""
        if not self._enabled:
            return
        line = {
            "step": step,
            "loss": metrics.loss,
            "lr": metrics.lr,
            "grad_norm": metrics.grad_norm,
            "tokens_per_s": metrics.tokens / metrics.seconds,
            "step_ms": 1e3 * metrics.seconds,
        }
        if metrics.gpus is not None:
            line["joules"] = metrics.gpus.joules
            line["joules_per_token"] = metrics.gpus.joules / metrics.tokens
            line["gpu_busy"] = metrics.gpus.busy
        self._loss = metrics.loss
        if not self._step_ms and attention_kernels() == "unfused":
            self._progress.note(UNFUSED)
        self._step_ms.append(line["step_ms"])
        self._log.write(line)
        self._board.write(line)
        self._progress.update(line)
        if metrics.spans:
            schedule = pipeline_schedule(self._config)
            write_execution(self._folder, schedule, step=step, spans=metrics.spans)

    def left_out(self, step: int) -> None:
        """A step that the guard leaves out, counted as completed."""
        if self._enabled:
            self._log.write({"step": step, "left_out": 1})

    def rolled_back(self, rollback: Rollback) -> None:
        """The run is back at a checkpoint: what was written after it is written anew."""
        if not self._enabled:
            return
        self._logs.close()
        self._open_logs(rollback.back_to)
        self._progress.note(
            f"step {rollback.step}: {rollback.problem}; back to the checkpoint of step "
            f"{rollback.back_to}, step {rollback.step} is left out"
        )

    def stopped(self, step: int) -> None:
        """The run was told to stop after ``step`` steps and has saved."""
        self._stopped_after = step

    def validation(self, step: int, loss: float, mappings: Mappings | None) -> None:
        """Record a validation and, with hyper-connections, the gain magnitudes."""
        if not self._enabled:
            return
        self._valid_loss = loss
        line = {"step": step, "valid_loss": loss}
        self._log.write(line)
        self._board.write(line)
        gain = ""
        if mappings is not None:
            gains = gain_magnitudes(mappings.res)
            self._log.write_gains(step, sublayers=mappings.names, gains=gains)
            self._board.write_gains(step, gains)
            gain = (
                f", composite gain {peak(gains.composite.forward):.3f} forward, "
                f"{peak(gains.composite.backward):.3f} backward"
            )
        self._progress.note(f"step {step}: validation loss {loss:.4f}{gain}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._enabled:
            return
        if error is not None:
            # On a full disk this fails as well, and what went wrong first has to come through.
            with contextlib.suppress(OSError):
                self._open.close()
                self._write_status("failed", str(error) or type(error).__name__)
            return
        self._open.close()
        self._write_status("finished" if self._stopped_after is None else "stopped")
        report = write_report(self._folder)
        if self._stopped_after is not None:
            print(f"told to stop: saved after step {self._stopped_after} of {self._config.steps}")
        elif self._step_ms:
            print(
                f"trained to step {self._config.steps}: loss {self._loss:.4f}, validation loss "
                f"{self._valid_loss:.4f}, median step {statistics.median(self._step_ms):.0f} ms"
            )
        else:
            print(f"{self._folder} has all {self._config.steps} steps already")
        print(f"report: {report}", flush=True)

    def _open_logs(self, done: int) -> None:
        self._log = self._logs.enter_context(MetricsLog(self._folder, done=done))
        board = TensorBoardLog(self._folder / "tensorboard", done=done)
        self._board = self._logs.enter_context(board)

    def _opening(self) -> str:
        mhc = self._config.mhc
        residual = f"{mhc.projection} n={mhc.num_streams}"
        if mhc.variant == "single_pass":
            residual = f"single-pass {residual}"
        if self._config.model.residual == "plain":
            residual = "plain"
        start = f"resumes after step {self._done}" if self._done else "starts"
        return (
            f"{self._folder}: {self._parameters:,} parameters, residual {residual}, "
            f"{layout_text(config_dict(self._config))}, "
            f"{self._config.dtype}, megatron-core {megatron.core.__version__}; {start}"
        )

    def _write_status(self, status: Any, error: str | None = None) -> None:
        write_run(
            self._folder,
            RunInfo(
                config=config_dict(self._config),
                environment=environment(self._config),
                status=status,
                parameters=self._parameters,
                error=error,
            ),
        )


def environment(config: TrainConfig) -> dict[str, Any]:
    """Versions and machine, for run.json."""
    gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
        "device": torch.cuda.get_device_name() if gpu else f"cpu ({platform.machine()})",
        "world_size": config.parallel.world_size,
    }
