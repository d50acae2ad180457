"""Layouts that are compared with one GPU, and the run of each."""

import importlib.util
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from mhc_megatron.config import Backend, MHCConfig
from mhc_megatron.training.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig

STEPS, NUM_MB, NUM_EXPERTS = 3, 8, 4
Bound = Literal["exact", "order", "rounding"]
# With Adam's usual one, a gradient of the size of its own rounding makes a whole step either way.
ADAM_EPS = 1e-3
SECONDS = 60.0  # of one case; the first compiles the kernels


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout, and how near it has to be to one GPU.

    Attributes:
        layout: arguments of ``ParallelConfig``.
        bound: see ``multigpu_parity.py``.
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
