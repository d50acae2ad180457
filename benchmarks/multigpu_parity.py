"""Layouts against one GPU: losses, gradients and parameters over a few optimizer steps.

One GPU trains for a few steps, and so does every layout, from the same parameters on the same
samples. Compared are the losses, the whole gradients of the first step, and the parameters after
the last. What is allowed depends on what the layout changes:

``exact``     A pipeline runs the same products on the same micro-batches, and adds up in their
              order: every bit is equal. Its single GPU cuts the layers where the pipeline does:
              within a stage the gradient of the streams between two layers is not rounded to
              bf16. (And bidirectional DualPipe adds up each direction's half; its single GPU does
              so, too.)
``order``     Data parallelism adds up the same micro-batches' gradients, in float32, in another
              order; scalars that nearly cancel lose most.
``rounding``  Tensor parallelism rounds partial sums to bf16 before it adds them. Such a run and
              one GPU's are two roundings of one float32 run. How far one GPU is from that is
              measured, and the layout may be ``ROUNDINGS`` times as far from the GPU. So may its
              losses, which may always differ by bf16's rounding over the root of N: means of N
              tokens whose logits are bf16, that by chance are nearer in one pair of runs.

Gradient norms are not clipped: the norm is a sum over ranks, and its last bit would be in all
parameters.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cudnn_first  # noqa: F401
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from ranks import Ranks, layouts

from mhc_megatron.config import Backend, MHCConfig
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.megatron.compat import require_transformer_engine_where_core_does
from mhc_megatron.training.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config, wrap_data_parallel
from mhc_megatron.training.optimizer import build_optimizer, update_groups
from mhc_megatron.training.pipeline import forward_backward_func
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.step import run_step

STEPS, NUM_MB, NUM_EXPERTS = 3, 8, 4
KINDS = ("gradients", "parameters")
Bound = Literal["exact", "order", "rounding"]
# float32's 6e-8 in sums of 8 micro-batches; in parameters a bf16 rounding that falls otherwise.
ORDER = {"gradients": 1e-4, "parameters": 1e-3}
BF16 = 2.0**-8
ROUNDINGS = 3.0  # twice for two roundings of one result, and what partial sums add to one
# With Adam's usual one, a gradient of the size of its own rounding makes a whole step either way.
ADAM_EPS = 1e-3
SECONDS = 60.0  # of one case; the first compiles the kernels


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout, and how near it has to be to one GPU.

    Attributes:
        layout: arguments of ``ParallelConfig``.
        bound: see the module.
        experts: a mixture of experts.
        padded: they drop tokens, and have their inputs padded.
        engine: Transformer Engine's modules, which exchange keys and values over ranks.
        cuts: of the layers on the single GPU, evenly; those between this layout's chunks.
        halves: one GPU adds up either half of the micro-batches by itself.
        graph: the last step is a CUDA graph.
        overlap: gradients are reduced and parameters gathered during backward and forward.
        spoiled: gradients of the hyper-connections are not added up over sequence-parallel ranks.
            It has to be found.
    """

    layout: dict[str, Any] = field(default_factory=dict)
    bound: Bound = "exact"
    experts: bool = False
    padded: bool = False
    engine: bool = False
    cuts: int = 0
    halves: bool = False
    graph: bool = False
    overlap: bool = False
    spoiled: bool = False

    @property
    def kind(self) -> str:
        """Of the model."""
        kind = "moe" if self.experts else "dense"
        return f"{kind}{'_padded' * self.padded}{'_engine' * self.engine}"

    def alone(self) -> "Case":
        """The single GPU's."""
        return replace(self, layout={}, bound="exact", graph=False, overlap=False, spoiled=False)


def cases(num_ranks: int) -> dict[str, Case]:
    """What ``num_ranks`` GPUs can run, by name."""
    sequence = {"tensor": 2, "sequence": True}
    overlapped: dict[str, Any] = {"schedule": "dualpipe_v", "overlap": "all"}
    found = {
        "tp2": Case(layout={"tensor": 2}, bound="rounding"),
        "tp2_sp": Case(layout=sequence, bound="rounding"),
        "tp2_sp_spoiled": Case(layout=sequence, bound="rounding", spoiled=True),
        "tp2_overlap": Case(layout={"tensor": 2, **overlapped}, bound="rounding"),
        "tp2_sp_overlap": Case(layout={**sequence, **overlapped}, bound="rounding"),
        "dp2": Case(layout={"data": 2}, bound="order"),
        "dp2_overlap": Case(layout={"data": 2}, bound="order", overlap=True),
        "ep2": Case(layout={"data": 2, "expert": 2}, bound="rounding", experts=True),
        "ep2_overlap": Case(
            layout={"data": 2, "expert": 2, **overlapped},
            bound="rounding",
            experts=True,
        ),
    }
    for ranks in (2, 4):
        for schedule in ("megatron", "one_f_one_b", "zb_h1", "dualpipe_v", "dualpipe"):
            name = "1f1b" if schedule == "megatron" else schedule
            layout = {"pipeline": ranks, "schedule": schedule}
            chunks = 2 * ranks if schedule == "dualpipe_v" else ranks
            halves = schedule == "dualpipe"
            found[f"pp{ranks}_{name}"] = Case(layout=layout, cuts=chunks - 1, halves=halves)
        dualpipe_v = found[f"pp{ranks}_dualpipe_v"]
        layout = {**dualpipe_v.layout, **overlapped}
        found[f"pp{ranks}_dualpipe_v_overlap"] = replace(dualpipe_v, layout=layout)
    found["ep2_padded"] = replace(found["ep2"], padded=True)
    found["pp2_dualpipe_v_experts"] = replace(found["pp2_dualpipe_v"], experts=True)
    found["pp2_dualpipe_v_overlap_experts"] = replace(found["pp2_dualpipe_v_overlap"], experts=True)
    found |= {
        "pp4_interleaved": Case(layout={"pipeline": 4, "virtual": 2}, cuts=7),
        "ep4": Case(layout={"data": 4, "expert": 4}, bound="rounding", experts=True),
        "tp2_sp_pp2_dualpipe_v": Case(
            layout={**sequence, "pipeline": 2, "schedule": "dualpipe_v"}, bound="rounding"
        ),
    }
    if importlib.util.find_spec("transformer_engine") is not None:
        found["cp2"] = Case(layout={"context": 2}, bound="rounding", engine=True)
    found["ep2_padded_overlap"] = replace(found["ep2_overlap"], padded=True)
    if torch.cuda.is_available():
        graphs = ("tp2_sp", "dp2", "pp2_1f1b", "pp2_dualpipe_v", "pp4_dualpipe_v")
        graphs += ("tp2_sp_overlap", "pp2_dualpipe_v_overlap", "ep2_padded", "ep2_padded_overlap")
        found |= {f"{name}_graph": replace(found[name], graph=True) for name in graphs}
    sizes = {name: ParallelConfig(**case.layout).world_size for name, case in found.items()}
    return {name: case for name, case in found.items() if sizes[name] <= num_ranks}


def run_config(
    size: dict[str, int],
    backend: Backend,
    layout: dict[str, Any],
    *,
    experts: bool = False,
    padded: bool = False,
    engine: bool = False,
    graph: bool = False,
) -> TrainConfig:
    """A bf16 model; ``size`` has ModelConfig's names."""
    moe = {
        "num_moe_experts": NUM_EXPERTS,
        "moe_ffn_hidden_size": size["ffn_hidden_size"] // 2,
        "moe_expert_capacity_factor": 1.0 if padded else None,
    }
    return TrainConfig(
        model=ModelConfig(**size, **(moe if experts else {})),
        # A rebuild on the lanes needs something to rebuild; it has the same bits.
        mhc=MHCConfig(backend=backend, recompute="auto" if "overlap" in layout else "none"),
        parallel=ParallelConfig(distributed_optimizer=True, **layout),
        optimizer=OptimizerConfig(
            lr=2e-3, min_lr=2e-3, warmup_steps=0, clip_grad=0.0, eps=ADAM_EPS
        ),
        steps=STEPS,
        micro_batch_size=1,
        global_batch_size=NUM_MB,
        dtype="bf16",
        transformer_impl="transformer_engine" if engine else "local",
        cuda_graph=graph,
        timeout_minutes=SECONDS / 60,
    )


def train(rank: int, world_size: int, config: TrainConfig, case: Case, folder: str) -> list[float]:
    """A job: the losses of all steps.

    The run starts from ``initial`` beside ``folder`` and leaves its ``gradients`` and
    ``parameters`` in it, as distributed checkpoints.
    """
    world = World(rank=rank, local_rank=rank, world_size=world_size)
    # Over context-parallel ranks Transformer Engine has no deterministic attention.
    sums = contextlib.nullcontext() if case.engine else deterministic()
    with sums, distributed_runtime(config, world):
        megatron_config = transformer_config(config)
        chunks = build_chunks(config, megatron_config, vocab_size=layouts.VOCAB)
        initial = _initial(Path(folder).parent, case)
        loaded = dist_checkpointing.load(layouts.sharded(chunks), str(initial))
        for index, chunk in enumerate(chunks):
            # Without Transformer Engine's extra state, which the checkpoint does not have.
            chunk.load_state_dict(loaded[f"chunk{index}"], strict=False)
        if world_size == 1:
            cut(chunks, case.cuts)
        if case.spoiled:
            drop_sequence_parallel_tags(chunks)
        if case.overlap:
            wrapped = [_overlapping(megatron_config, chunk) for chunk in chunks]
            megatron_config.no_sync_func = wrapped[0].no_sync
        else:
            wrapped = wrap_data_parallel(config, megatron_config, chunks)
        optimizer = build_optimizer(config, wrapped)
        megatron_config.grad_scale_func = optimizer.scale_loss
        forward_backward = forward_backward_func(config, megatron_config)
        if case.halves and world_size == 1:
            forward_backward = partial(layouts.in_halves, forward_backward, megatron_config)
        losses = []
        for step in range(config.steps):
            update_groups(config, optimizer, step)
            for chunk in wrapped:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            whole = step == 0 and not case.overlap
            megatron_config.finalize_model_grads_func = (
                layouts.finalize_whole_gradients if whole else finalize_model_grads
            )
            batches = layouts.micro_batches(config, step)
            losses.append(run_step(config, forward_backward, wrapped, batches))
            if whole:
                _save(_gradients(chunks), Path(folder) / "gradients")
            optimizer.step()
        if case.overlap:
            for chunk in wrapped:
                chunk.disable_forward_pre_hook()
        _save(layouts.sharded(chunks), Path(folder) / "parameters")
    return losses


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Torch's own kernels take the same sums in the same order in every run."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def cut(chunks: list[torch.nn.Module], cuts: int) -> None:
    """Let layers end, and begin, as those at the ends of ``cuts`` + 1 chunks do."""
    layers = [layer for chunk in chunks for layer in chain_of(chunk).layers]
    size = len(layers) // (cuts + 1)
    for layer in layers[size - 1 :: size]:
        layer.hands_over = False


def drop_sequence_parallel_tags(chunks: list[torch.nn.Module]) -> None:
    """The fault of ``Case.spoiled``."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "hyper_connection" in name:
                parameter.sequence_parallel = False


def _overlapping(megatron_config: Any, chunk: torch.nn.Module) -> DistributedDataParallel:
    elements = sum(parameter.numel() for parameter in chunk.parameters())
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        bucket_size=elements // 8,  # several, so that there is something to overlap
    )
    return DistributedDataParallel(megatron_config, ddp_config, chunk)


def _gradients(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """The chunks' entries of a checkpoint with gradients as their data.

    The parameters' own data stay: a moment of another dtype would cost them DDP's hooks.
    """
    state = layouts.sharded(chunks)
    for entries in state.values():
        for entry in entries.values():
            entry.data = entry.data.main_grad
            if isinstance(entry, ShardedTensor):
                entry.dtype = entry.data.dtype
    return state


def _save(state: dict[str, Any], folder: Path) -> None:
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder))


@dataclass(frozen=True, kw_only=True)
class Single:
    """What one GPU left in ``folder``, and its losses."""

    folder: Path
    losses: list[float]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How far one GPU in bf16 is from float32: losses, and tensors by kind and name."""

    loss: float
    tensors: dict[str, dict[str, float]]


class Parity:
    """The cases of a run, and the single GPUs that they need, each made once.

    Args:
        ranks: that run the jobs.
        folder: for checkpoints.
        size: of the model.
        backend: of the hyper-connections.
    """

    def __init__(self, ranks: Ranks, folder: Path, size: dict[str, int], backend: Backend) -> None:
        self._ranks, self._folder, self._size, self._backend = ranks, folder, size, backend
        self._singles: dict[str, Single] = {}
        self._noise: dict[str, Noise] = {}

    def line(self, name: str, case: Case) -> dict[str, Any]:
        """The result line of a case, without provenance.

        Raises:
            WorkerFailed: a job failed.
            UserError: this layout is not supported here.
        """
        config = self._config(case)
        require_transformer_engine_where_core_does(transformer_config(config))
        single = self._single(case)
        noise = None if case.bound == "exact" else self._noise_of(case)
        found = self._train(name, config, case)
        errors = {
            f"{kind}.{tensor}": error
            for kind in KINDS
            if not (kind == "gradients" and case.overlap)  # each rank has its shard only
            for tensor, error in self._differences(found, single, kind).items()
        }
        loss = _largest_difference(found.losses, single.losses)
        outside = {n: e for n, e in errors.items() if not e <= _bound(case, n, noise)}
        if not loss <= _loss_bound(noise, NUM_MB * config.model.seq_length):
            outside["losses"] = loss
        return {
            "impl": f"mhc_megatron.{name}",
            "shape": {
                "T": config.model.seq_length,
                "C": config.model.hidden_size,
                "n": config.mhc.num_streams,
                "layers": config.model.num_layers,
                "micro_batches": NUM_MB,
                "steps": STEPS,
                "ranks": config.parallel.world_size,
            },
            "metric": "parity",
            "value": len(errors) + 1,
            "unit": "tensors",
            "mismatches": len(outside),
            "outside": dict(sorted(outside.items(), key=lambda item: -item[1])[:4]),
            "bound": case.bound,
            "largest": {
                kind: max((e for n, e in errors.items() if n.startswith(kind)), default=None)
                for kind in KINDS
            }
            | {"losses": loss},
            "rounding": noise
            and {kind: max(noise.tensors[kind].values()) for kind in KINDS}
            | {"losses": noise.loss},
        }

    def _single(self, case: Case) -> Single:
        alone = case.alone()
        name = f"{alone.kind}_cuts{alone.cuts}{'_in_halves' * alone.halves}"
        if name not in self._singles:
            config = self._config(alone)
            initial = _initial(self._folder, case)
            if not initial.exists():
                initial.mkdir()
                self._ranks.run(layouts.save_initial, 1, config, str(initial), seconds=SECONDS)
            self._singles[name] = self._train(name, config, alone)
        return self._singles[name]

    def _noise_of(self, case: Case) -> Noise:
        kind = case.kind
        if kind not in self._noise:
            single = self._single(case)
            # In float32, by the definition of the hyper-connections.
            config = replace(self._config(case.alone()), dtype="fp32")
            config = replace(config, mhc=replace(config.mhc, backend="reference"))
            truth = self._train(f"float32_{kind}", config, case.alone())
            self._noise[kind] = Noise(
                loss=_largest_difference(single.losses, truth.losses),
                tensors={tensors: self._differences(single, truth, tensors) for tensors in KINDS},
            )
        return self._noise[kind]

    def _config(self, case: Case) -> TrainConfig:
        return run_config(
            *(self._size, self._backend, case.layout),
            experts=case.experts,
            padded=case.padded,
            engine=case.engine,
            graph=case.graph,
        )

    def _train(self, name: str, config: TrainConfig, case: Case) -> Single:
        folder = self._folder / name
        losses = self._ranks.run(
            train, config.parallel.world_size, config, case, str(folder), seconds=SECONDS
        )
        assert all(other == losses[0] for other in losses), "every rank reports the same losses"
        return Single(folder=folder, losses=losses[0])

    def _differences(self, left: Single, right: Single, kind: str) -> dict[str, float]:
        folders = (str(left.folder / kind), str(right.folder / kind))
        [errors] = self._ranks.run(layouts.differences, 1, *folders, seconds=SECONDS)
        return errors


def _initial(folder: Path, case: Case) -> Path:
    return folder / f"initial_{case.kind}"


def _largest_difference(losses: list[float], others: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


def _bound(case: Case, name: str, noise: Noise | None) -> float:
    """The relative difference that a tensor may have."""
    if noise is None:
        return 0.0
    kind = name.split(".", 1)[0]
    if case.bound == "order":
        return ORDER[kind]
    # A gate's gradient is one number per layer: all gates of its kind say more than it alone.
    alike = [n for t, n in noise.tensors[kind].items() if _last(t) == _last(name)]
    return ROUNDINGS * max(alike)


def _loss_bound(noise: Noise | None, num_tokens: int) -> float:
    if noise is None:
        return 0.0
    return max(ROUNDINGS * noise.loss, BF16 / num_tokens**0.5)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
