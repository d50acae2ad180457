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

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parity_cases import NUM_MB, SECONDS, STEPS, Case, run_config
from parity_training import initial_of, train
from ranks import Ranks, layouts

from mhc_megatron.config import Backend
from mhc_megatron.megatron.compat import require_transformer_engine_where_core_does
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import transformer_config

KINDS = ("gradients", "parameters")
# float32's 6e-8 in sums of 8 micro-batches; in parameters a bf16 rounding that falls otherwise.
ORDER = {"gradients": 1e-4, "parameters": 1e-3}
BF16 = 2.0**-8
ROUNDINGS = 3.0  # twice for two roundings of one result, and what partial sums add to one


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
            initial = initial_of(self._folder, case)
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
