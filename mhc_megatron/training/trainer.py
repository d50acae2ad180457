"""One rank's model, data and optimizer: step, evaluate, save, resume."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from mhc_megatron.data.dataset import batch, build_datasets, check_split, micro_batch_indices
from mhc_megatron.data.prepare import prepare_embedded
from mhc_megatron.data.tokenizer import load_tokenizer
from mhc_megatron.errors import UserError
from mhc_megatron.fp8 import reject_unreadable_scales
from mhc_megatron.launch.environment import allows_pickled_scales
from mhc_megatron.megatron.engine import refuses_pickled_scales
from mhc_megatron.megatron.step_graph import StepGraph
from mhc_megatron.pipeline.measure import Spans
from mhc_megatron.training import checkpoint
from mhc_megatron.training.async_save import BackgroundSave
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.gpu_meter import GpuUse, open_meter, use_of_all
from mhc_megatron.training.heartbeat import Heartbeat, prepare_heartbeats
from mhc_megatron.training.model import (
    build_chunks,
    count_parameters,
    transformer_config,
    wrap_data_parallel,
)
from mhc_megatron.training.optimizer import build_optimizer, update_groups
from mhc_megatron.training.pipeline import (
    data_rank,
    executor_of,
    forward_backward_func,
    measured,
    pipeline_ranks,
)
from mhc_megatron.training.probe import Mappings, probe_mappings
from mhc_megatron.training.step import Batch, launch_step, run_step
from mhc_megatron.training.verify import newest_good

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one optimizer step reports.

    Attributes:
        loss: mean cross entropy per token, nats.
        grad_norm: global gradient norm before clipping.
        lr: learning rate used.
        seconds: wall time of the step.
        tokens: tokens of the global batch.
        spans: of the last step under a schedule of ours, what every pipeline rank's actions took.
        gpus: energy and utilisation since the step before ended; None where NVML does not tell.
    """

    loss: float
    grad_norm: float
    lr: float
    seconds: float
    tokens: int
    spans: list[Spans] = field(default_factory=list)
    gpus: GpuUse | None = None


class Trainer:
    """Model, data and optimizer of one rank inside ``distributed_runtime``."""

    def __init__(self, config: TrainConfig) -> None:
        if config.fp8 is not None:
            reject_unreadable_scales(
                config, refuses=refuses_pickled_scales(), allowed=allows_pickled_scales()
            )
        self.config = config
        self.folder = Path(config.out)
        on_rank_zero(lambda: prepare_heartbeats(self.folder))
        self.heartbeat = Heartbeat(self.folder, rank=torch.distributed.get_rank())
        tokenizer = load_tokenizer(config.data.tokenizer)
        train_prefix, valid_prefix = on_rank_zero(lambda: _prepare_data(config))
        eval_samples = max(1, config.eval_iters) * config.global_batch_size
        self.train_data, self.valid_data = build_datasets(
            train_prefix,
            valid_prefix,
            seq_length=config.model.seq_length,
            train_samples=config.steps * config.global_batch_size,
            valid_samples=eval_samples,
            seed=config.seed,
            tokenizer=tokenizer,
            cache_dir=self.folder / "data-cache",
        )
        self.megatron_config = transformer_config(config)
        self.bare_chunks = build_chunks(
            config, self.megatron_config, vocab_size=tokenizer.vocab_size
        )
        self.parameters = count_parameters(self.bare_chunks)
        self.chunks = wrap_data_parallel(config, self.megatron_config, self.bare_chunks)
        self.optimizer = build_optimizer(config, self.chunks)
        self.background = BackgroundSave(self.folder / "checkpoints", config)
        self._meter = open_meter()
        self._ahead: tuple[int, list[Batch]] | None = None
        self.megatron_config.grad_scale_func = self.optimizer.scale_loss
        self.forward_backward = forward_backward_func(config, self.megatron_config)
        executor = executor_of(self.forward_backward)
        if executor is not None:
            self.heartbeat.pipeline = pipeline_ranks(config)
            executor.progress = self.heartbeat.item

    def resume(self) -> int:
        """Load the newest whole checkpoint; returns the completed steps, 0 without one."""
        self.heartbeat.begin("loads a checkpoint", together=True)
        found = newest_good(self.folder / "checkpoints", self.config)
        if found is None:
            return 0
        if isinstance(self.forward_backward, StepGraph):
            self.forward_backward.forget()
        return checkpoint.load(found, chunks=self.bare_chunks, optimizer=self.optimizer)

    def save(self, step: int) -> None:
        """Publish a checkpoint after ``step`` steps; with ``async_save``, begin to write it."""
        self.finish_save()
        self.heartbeat.begin("saves a checkpoint", together=True)
        if self.config.async_save:
            self.background.start(step, chunks=self.bare_chunks, optimizer=self.optimizer)
            self.heartbeat.begin("between steps")
            return
        checkpoint.save(
            self.folder / "checkpoints",
            step,
            config=self.config,
            chunks=self.bare_chunks,
            optimizer=self.optimizer,
        )
        self.heartbeat.begin("between steps")

    def poll_save(self) -> None:
        """Publish the checkpoint that is written in the background, if all ranks are done."""
        if self.background.pending:
            self.heartbeat.begin("asks whether a checkpoint is written", together=True)
            self.background.poll()
            self.heartbeat.begin("between steps")

    def finish_save(self) -> None:
        """Wait for the checkpoint that is written in the background, and publish it."""
        if self.background.pending:
            self.heartbeat.begin("waits for a checkpoint to be written", together=True)
            self.background.finish()
            self.heartbeat.begin("between steps")

    def step(self, step: int) -> StepMetrics:
        """One optimizer step on the global batch of 0-based ``step``."""
        start = time.perf_counter()
        self.heartbeat.begin("reads data", step=step + 1)
        lr = update_groups(self.config, self.optimizer, step)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = self._training_batches(step)
        self.heartbeat.begin("forward and backward")
        # Of a graph the host does not wait for the loss: while the GPU works it reads ahead and
        # comes to the optimizer. Else it does, so that what hangs is named by what it hangs in.
        run = launch_step if self.config.cuda_graph else run_step
        with measured(
            self.config, self.forward_backward, enabled=step == self.config.steps - 1
        ) as spans:
            loss = run(self.config, self.forward_backward, self.chunks, batches)
        self._read_ahead(step + 1)
        self.heartbeat.begin("optimizer", together=True)
        _, grad_norm, _ = self.optimizer.step()
        loss = float(loss)
        # With the guard, all ranks judge the step together once it is over (training/rollback.py).
        stops = not self.config.guard.max_rollbacks
        if stops:
            self._require_finite("loss", loss, step + 1)
        # fp16 skips a step whose gradients overflow; the other dtypes never should.
        if stops and self.config.dtype != "fp16" and grad_norm is not None:
            self._require_finite("gradient norm", float(grad_norm), step + 1)
        self.heartbeat.begin("between steps")
        return StepMetrics(
            loss=loss,
            grad_norm=float(grad_norm) if grad_norm is not None else math.nan,
            lr=lr,
            seconds=time.perf_counter() - start,
            tokens=self.config.global_batch_size * self.config.model.seq_length,
            spans=spans,
            gpus=self._gpu_use(),
        )

    @torch.no_grad()
    def evaluate(self) -> tuple[float, Mappings | None]:
        """Validation loss and, with hyper-connections, the residual mappings.

        Returns:
            (mean loss per token over ``eval_iters`` global batches, token-averaged H_res of every
            sublayer or None).
        """
        self.heartbeat.begin("validation")
        for chunk in self.chunks:
            chunk.eval()
        with probe_mappings(self.bare_chunks) as probe:
            losses = [
                run_step(
                    self.config,
                    self.forward_backward,
                    self.chunks,
                    self._batches(self.valid_data, index),
                    forward_only=True,
                )
                for index in range(max(1, self.config.eval_iters))
            ]
        mappings = None if self.config.model.residual == "plain" else probe.gather()
        self.heartbeat.begin("between steps")
        return sum(losses) / len(losses), mappings

    def _gpu_use(self) -> GpuUse | None:
        if self._meter is None:
            return None
        return use_of_all(self._meter.read(), torch.cuda.current_device())

    def _require_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            self.finish_save()  # of steps that were good
        require_finite(what, value, step)

    def _training_batches(self, step: int) -> list[Batch]:
        """What was read ahead, if it is of this step."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == step:
            return ahead[1]
        return self._batches(self.train_data, step)

    def _read_ahead(self, step: int) -> None:
        if step < self.config.steps:
            self.heartbeat.begin("reads data")
            self._ahead = step, self._batches(self.train_data, step)

    def _batches(self, dataset: Any, step: int) -> list[Batch]:
        return [
            {key: _on_device(value) for key, value in batch(dataset, indices).items()}
            for indices in micro_batch_indices(
                step,
                global_batch_size=self.config.global_batch_size,
                micro_batch_size=self.config.micro_batch_size,
                data_rank=data_rank(self.config),
                data_size=self.config.parallel.data,
            )
        ]


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Copied to the GPU in its turn; the host does not wait, which it would without pages of its
    own."""
    if torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(torch.cuda.current_device(), non_blocking=True)


def _prepare_data(config: TrainConfig) -> tuple[str, str]:
    """Check (and for the embedded corpus, make) both splits before any model is built."""
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer)
    if bool(data.train) != bool(data.valid):
        raise UserError(
            f"data.train={data.train!r} and data.valid={data.valid!r}: set both, or neither for "
            "the embedded corpus"
        )
    if data.train:
        prefixes = (data.train, data.valid)
    else:
        prefixes = prepare_embedded(Path(config.out).parent / "corpus", tokenizer=tokenizer)
    for prefix in prefixes:
        check_split(prefix, vocab_size=tokenizer.vocab_size, seq_length=config.model.seq_length)
    return prefixes


def on_rank_zero(function: Callable[[], _Value]) -> _Value:
    """Run ``function`` on rank 0 and give every rank its result, or its UserError."""
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def require_finite(what: str, value: float, step: int) -> None:
    """Stop every rank when a number that all of them share is not finite."""
    if not math.isfinite(value):
        raise UserError(
            f"{what} is {value} at step {step} (seen on rank {torch.distributed.get_rank()}); "
            "stopped before anything was saved, the last checkpoint is intact. Lower optimizer.lr "
            "or raise optimizer.warmup_steps"
        )
