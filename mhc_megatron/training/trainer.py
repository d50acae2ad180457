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
from mhc_megatron.pipeline.measure import Spans
from mhc_megatron.training import checkpoint
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import (
    build_chunks,
    count_parameters,
    transformer_config,
    wrap_data_parallel,
)
from mhc_megatron.training.optimizer import build_optimizer, update_groups
from mhc_megatron.training.pipeline import data_rank, forward_backward_func, measured
from mhc_megatron.training.probe import Mappings, probe_mappings
from mhc_megatron.training.step import Batch, run_step

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
    """

    loss: float
    grad_norm: float
    lr: float
    seconds: float
    tokens: int
    spans: list[Spans] = field(default_factory=list)


class Trainer:
    """Model, data and optimizer of one rank inside ``distributed_runtime``."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = Path(config.out)
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
        self.megatron_config.grad_scale_func = self.optimizer.scale_loss
        self.forward_backward = forward_backward_func(config, self.megatron_config)

    def resume(self) -> int:
        """Load the newest complete checkpoint; returns the completed steps, 0 without one."""
        found = on_rank_zero(self._newest_checkpoint)
        if found is None:
            return 0
        return checkpoint.load(found, chunks=self.bare_chunks, optimizer=self.optimizer)

    def _newest_checkpoint(self) -> Path | None:
        complete = checkpoint.list_checkpoints(self.folder / "checkpoints")
        if not complete:
            return None
        checkpoint.verify(complete[-1], self.config)
        return complete[-1]

    def save(self, step: int) -> None:
        """Publish a checkpoint after ``step`` steps."""
        checkpoint.save(
            self.folder / "checkpoints",
            step,
            config=self.config,
            chunks=self.bare_chunks,
            optimizer=self.optimizer,
        )

    def step(self, step: int) -> StepMetrics:
        """One optimizer step on the global batch of 0-based ``step``."""
        start = time.perf_counter()
        lr = update_groups(self.config, self.optimizer, step)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = self._batches(self.train_data, step)
        with measured(
            self.config, self.forward_backward, enabled=step == self.config.steps - 1
        ) as spans:
            loss = run_step(self.config, self.forward_backward, self.chunks, batches)
        require_finite("loss", loss, step + 1)
        _, grad_norm, _ = self.optimizer.step()
        # fp16 skips a step whose gradients overflow; the other dtypes never should.
        if self.config.dtype != "fp16" and grad_norm is not None:
            require_finite("gradient norm", float(grad_norm), step + 1)
        return StepMetrics(
            loss=loss,
            grad_norm=float(grad_norm) if grad_norm is not None else math.nan,
            lr=lr,
            seconds=time.perf_counter() - start,
            tokens=self.config.global_batch_size * self.config.model.seq_length,
            spans=spans,
        )

    @torch.no_grad()
    def evaluate(self) -> tuple[float, Mappings | None]:
        """Validation loss and, with hyper-connections, the residual mappings.

        Returns:
            (mean loss per token over ``eval_iters`` global batches, token-averaged H_res of every
            sublayer or None).
        """
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
        loss = sum(losses) / len(losses)
        if self.config.model.residual == "plain":
            return loss, None
        return loss, probe.gather()

    def _batches(self, dataset: Any, step: int) -> list[Batch]:
        device = torch.cuda.current_device()
        return [
            {key: value.to(device) for key, value in batch(dataset, indices).items()}
            for indices in micro_batch_indices(
                step,
                global_batch_size=self.config.global_batch_size,
                micro_batch_size=self.config.micro_batch_size,
                data_rank=data_rank(self.config),
                data_size=self.config.parallel.data,
            )
        ]


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
