"""GPT chunks with hyper-connections under a schedule whose ranks share this process.

The chunks are Megatron's, as training builds them. ``VirtualRanks`` computes one step twice: by a
plain loop over micro-batches and chunks, and by the schedule, with a thread for each rank and on a
GPU a stream. Random delays shift the ranks against each other, so that a message that is read
before it is written, or memory that is used again too early, shows in the losses and gradients.
"""

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cudnn_first  # noqa: F401
import torch
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.megatron.chunk_phases import mark_phases
from mhc_megatron.megatron.cpu_runtime import cpu_runtime_in_thread
from mhc_megatron.megatron.delayed_wgrad import QueuedWeightGrads
from mhc_megatron.megatron.overlap import LaneOverlap, PhasedStage
from mhc_megatron.megatron.phases import Lanes, PhaseMarker
from mhc_megatron.pipeline.actions import Transfer
from mhc_megatron.pipeline.executor import execute
from mhc_megatron.pipeline.in_process import InProcessTransport, run_ranks
from mhc_megatron.pipeline.lower import lower
from mhc_megatron.pipeline.phases import Lane, OverlapMode
from mhc_megatron.pipeline.stage import AutogradStage, Stage
from mhc_megatron.pipeline.transport import Message, Receipt, Transport
from mhc_megatron.recompute import ForwardRecompute
from mhc_megatron.training.config import ModelConfig, ParallelConfig, TrainConfig
from mhc_megatron.training.model import stage_chunk, transformer_config
from mhc_megatron.training.pipeline import pipeline_schedule

VOCAB = 512
# A stream is held up now and then, for longer than the threads of all ranks together need to
# enqueue what follows, so that what does not wait for a message finds it unwritten.
_SHARE_DELAYED = 0.05
_MOST_DELAY = 0.08  # seconds on a GPU
_MOST_DELAY_OF_A_THREAD = 3e-4  # a forward of a small chunk takes about as long
_CYCLES_PER_SECOND = 1.5e9  # of a GPU, roughly: a delay has no exact length to keep

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What a step leaves: losses by micro-batch, gradients by name of chunk and parameter."""

    losses: Tensor
    gradients: dict[str, Tensor]

    def differences(self, other: "Step") -> list[str]:
        """What is not equal to the last bit, or not finite."""
        names = [] if torch.equal(self.losses, other.losses) else ["losses"]
        assert self.gradients.keys() == other.gradients.keys()
        names += [n for n, g in self.gradients.items() if not torch.equal(g, other.gradients[n])]
        return names + ([] if self.losses.isfinite().all() else ["losses not finite"])


def run_config(
    schedule: str,
    num_ranks: int,
    *,
    hidden_size: int,
    seq_length: int,
    overlap: OverlapMode = "none",
    **options: Any,
) -> TrainConfig:
    """bf16, one layer per stage, 2P micro-batches of one sequence; ``options`` of TrainConfig.

    With ``overlap`` of rebuilds, each stage is one recompute block.
    """
    parallel = ParallelConfig(
        pipeline=num_ranks,
        schedule=schedule,  # type: ignore[arg-type]
        distributed_optimizer=True,
        overlap=overlap,
    )
    rebuilds = overlap in ("recompute", "all")
    return TrainConfig(
        model=ModelConfig(
            num_layers=parallel.num_stages,
            hidden_size=hidden_size,
            num_attention_heads=4,
            ffn_hidden_size=2 * hidden_size,
            seq_length=seq_length,
        ),
        mhc=MHCConfig(num_streams=4, recompute="stage" if rebuilds else "none"),
        parallel=parallel,
        micro_batch_size=1,
        global_batch_size=2 * num_ranks,
        dtype="bf16",
        **options,
    )


class VirtualRanks:
    """The chunks of a run, all of them in this process; made inside ``distributed_runtime``.

    Transformer Engine keeps a workspace and FP8's state per process, not per rank: with it the
    ranks take turns, on one stream.

    Args:
        config: the run; its layout's pipeline is that of the virtual ranks.
        device: of the chunks.
        delay: Transformer Engine's weight gradients wait for W. Without, I computes them.
    """

    def __init__(self, config: TrainConfig, device: torch.device, *, delay: bool = True) -> None:
        self.config, self.device = config, device
        self._turns = config.transformer_impl == "transformer_engine"
        self.schedule = pipeline_schedule(config)
        # Megatron's tracker of random states is one for all threads and refuses to be in two
        # states at once; the one for inference leaves them alone. Nothing here is random.
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        self._programs = lower(self.schedule)
        megatron_config = transformer_config(config)
        megatron_config.masked_softmax_fusion = False  # its extension comes with apex only
        megatron_config.delay_wgrad_compute &= delay
        # [copy][stage]: bidirectional DualPipe computes the second half on copies.
        self.chunks = [
            [
                stage_chunk(config, megatron_config, stage, vocab_size=VOCAB)
                for stage in range(self.schedule.num_stages)
            ]
            for _ in range(self.schedule.placement.num_copies)
        ]
        self._queued = [[QueuedWeightGrads(chunk) for chunk in chunks] for chunks in self.chunks]
        self._parameters = [_named_parameters(chunks) for chunks in self.chunks]
        self._initial = {
            name: parameter.detach().clone() for name, parameter in self._parameters[0].items()
        }
        self._batches: list[Batch] = []

    def draw(self, seed: int) -> None:
        """Parameters at which no gradient vanishes, equal in all copies, and micro-batches."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, initial in self._initial.items():
            scale = 0.02 if initial.dim() > 1 else 0.3
            noise = torch.randn(
                initial.shape, generator=generator, device=self.device, dtype=torch.float32
            )
            drawn = initial + (noise * scale).to(initial.dtype)
            for parameters in self._parameters:
                parameters[name].data.copy_(drawn)
        length = self.config.model.seq_length
        self._batches = []
        for _ in range(self.schedule.num_mb):
            size = (1, length + 1)
            tokens = torch.randint(0, VOCAB, size, generator=generator, device=self.device)
            self._batches.append({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})

    def serial(self) -> Step:
        """A loop over micro-batches and chunks; with two copies, a half of them on each."""
        self._forget()
        losses = []
        for mb in range(self.schedule.num_mb):
            x = None
            copy = int(self.schedule.placement.is_mirrored(mb))
            for stage in range(self.schedule.num_stages):
                x = self._forward(copy, stage, mb, x)
            assert x is not None
            x.backward()
            for queued in self._queued[copy]:
                queued.take()()
            losses.append(x.detach())
        return self._step(losses)

    def pipelined(self, *, delays: int | None = None, ordered: bool = True) -> Step:
        """The schedule.

        Args:
            delays: seed of the delays before forwards and backwards; None for none.
            ordered: messages wait for the work that makes them. Without, on a GPU, the result is
                expected to be wrong: it shows that ``serial`` would find such a fault.
        """
        self._forget()
        placement = self.schedule.placement
        home = [placement.rank_of(stage, 0) for stage in range(self.schedule.num_stages)]
        message = Message(
            shape=(
                self.config.model.seq_length,
                1,
                self.config.model.hidden_size * self.config.mhc.num_streams,
            ),
            dtype=torch.bfloat16,
            device=self.device,
        )

        turn = threading.Lock()

        def rank(transport: InProcessTransport) -> dict[int, Tensor]:
            stages: dict[int, Stage] = {}
            mode = self.config.parallel.overlap
            lanes = None if mode == "none" else Lanes(self.device)
            for number in placement.stages_on(transport.rank):
                copy = int(home[number] != transport.rank)
                queued = self._queued[copy][number]
                late = None if delays is None else random.Random(f"{delays} {copy} {number}")
                options: dict[str, Any] = {
                    "queued": queued.take if queued else None,
                    "name": f"stage {number}",
                }
                if lanes is not None:
                    stages[number] = self._phased(copy, number, lanes, late, options)
                    continue
                stage = AutogradStage(self._function(copy, number), **options)
                stages[number] = Late(stage, late, self.device)
                if self._turns:
                    stages[number] = TakesTurns(stages[number], turn)
            with cpu_runtime_in_thread():
                return execute(
                    self._programs[transport.rank],
                    stages,
                    transport if ordered else Unordered(transport),
                    num_stages=self.schedule.num_stages,
                    message=message,
                    overlap=None if lanes is None else LaneOverlap(lanes),
                )

        device = self.device if self.device.type == "cuda" and not self._turns else None
        try:
            outputs = run_ranks(rank, self.schedule.num_ranks, device=device)
        finally:
            for chunk in (chunk for chunks in self.chunks for chunk in chunks):
                chain = chain_of(chunk)
                assert chain is not None
                chain.marker = None
        found = {mb: loss for output in outputs for mb, loss in output.items()}
        return self._step([found[mb] for mb in range(self.schedule.num_mb)])

    def pipelined_against_serial(self, seed: int, *, ordered: bool = True) -> list[str]:
        """What differs between the schedule, with delays drawn from ``seed``, and the loop."""
        expected = self.serial()
        return self.pipelined(delays=seed, ordered=ordered).differences(expected)

    def _function(self, copy: int, stage: int) -> Callable[[int, Tensor | None], Tensor]:
        return lambda mb, x: self._forward(copy, stage, mb, x)

    def _phased(
        self, copy: int, stage: int, lanes: Lanes, late: random.Random | None, options: Any
    ) -> PhasedStage:
        chunk = self.chunks[copy][stage]
        ends_model = stage == self.schedule.num_stages - 1
        mark_phases(chunk, lanes, self.config.parallel.overlap, ends_model=ends_model)
        chain = chain_of(chunk)
        assert chain is not None and chain.marker is not None
        marker, recompute = chain.marker, chain.recompute
        if late is not None:
            marker = chain.marker = LateMarker(marker, late)
        dropped: dict[int, ForwardRecompute] = {}

        def function(mb: int, x: Tensor | None) -> Tensor:
            marker.start()
            output = self._forward(copy, stage, mb, x)
            if recompute is not None:
                dropped[mb] = recompute.take()
            marker.end(output)
            return output

        def rebuild(mb: int) -> None:
            if mb in dropped:
                dropped.pop(mb).rebuild()

        ahead = marker.rebuilds_ahead
        return PhasedStage(
            function,
            marker,
            take_dropped=dropped.pop if ahead else None,
            rebuild=rebuild,
            **options,
        )

    def _forward(self, copy: int, stage: int, mb: int, x: Tensor | None) -> Tensor:
        chunk: Any = self.chunks[copy][stage]
        batch = self._batches[mb]
        chunk.set_input_tensor(x)
        positions = torch.arange(self.config.model.seq_length, device=self.device)[None]
        output = chunk(batch["tokens"], positions, None)
        if stage < self.schedule.num_stages - 1:
            return output
        # Megatron's loss reduces over one communicator, which two ranks would use at once.
        return torch.nn.functional.cross_entropy(
            output.float().flatten(0, 1), batch["labels"].flatten()
        )

    def _forget(self) -> None:
        for parameters in self._parameters:
            for parameter in parameters.values():
                parameter.grad = None
        for chunks in self.chunks:
            for chunk in chunks:
                chunk.set_is_first_microbatch()  # Transformer Engine keeps FP8 weights till then

    def _step(self, losses: list[Tensor]) -> Step:
        gradients = {}
        for copy, parameters in enumerate(self._parameters):
            for name, parameter in parameters.items():
                assert parameter.grad is not None, name
                gradients[f"{copy}.{name}"] = parameter.grad.clone()
        return Step(torch.stack(losses), gradients)


def _named_parameters(chunks: list[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    return {
        f"{stage}.{name}": parameter
        for stage, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }


class Late:
    """A stage whose forwards and backwards start after a random delay on the rank's stream."""

    def __init__(self, stage: Stage, delays: random.Random | None, device: torch.device) -> None:
        self._stage, self._delays, self._device = stage, delays, device

    def forward(self, mb: int, x: Tensor | None) -> Tensor:
        """As in ``Stage``."""
        self._wait()
        return self._stage.forward(mb, x)

    def backward(self, mb: int, grad: Tensor | None, *, defer_weights: bool) -> Tensor | None:
        """As in ``Stage``."""
        self._wait()
        return self._stage.backward(mb, grad, defer_weights=defer_weights)

    def weights(self, mb: int) -> None:
        """As in ``Stage``."""
        self._stage.weights(mb)

    def recompute(self, mb: int) -> None:
        """As in ``Stage``."""
        self._stage.recompute(mb)

    @property
    def unfinished(self) -> tuple[int, ...]:
        """As in ``Stage``."""
        return self._stage.unfinished

    def _wait(self) -> None:
        if self._delays is not None:
            hold_up(self._delays, on_gpu=self._device.type == "cuda")


class LateMarker(PhaseMarker):
    """Marks phases, and at each of them holds up a lane now and then, whichever."""

    def __init__(self, marker: PhaseMarker, delays: random.Random) -> None:
        super().__init__(marker.phases, marker.lanes, rebuilds_ahead=marker.rebuilds_ahead)
        self._delays = delays

    def begin(
        self,
        name: str,
        *tensors: Tensor,
        past: Sequence[Tensor] = (),
        used: Sequence[Tensor | None] = (),
    ) -> tuple[Tensor, ...]:
        """As in ``PhaseMarker``."""
        marked = super().begin(name, *tensors, past=past, used=used)
        stream = self.lanes.stream(self._delays.choice(list(Lane)))
        with torch.cuda.stream(stream):
            hold_up(self._delays, on_gpu=stream is not None)
        return marked


def hold_up(delays: random.Random, *, on_gpu: bool) -> None:
    """A random delay: of the thread on the CPU, now and then of the current stream on a GPU."""
    fraction = delays.random()
    if not on_gpu:
        time.sleep(fraction * _MOST_DELAY_OF_A_THREAD)
    elif fraction < _SHARE_DELAYED:
        seconds = fraction / _SHARE_DELAYED * _MOST_DELAY
        torch.cuda._sleep(int(seconds * _CYCLES_PER_SECOND))


@dataclasses.dataclass(frozen=True)
class TakesTurns:
    """A stage that computes while no other of the process does."""

    stage: Stage
    turn: threading.Lock

    def forward(self, mb: int, x: Tensor | None) -> Tensor:
        """As in ``Stage``."""
        with self.turn:
            return self.stage.forward(mb, x)

    def backward(self, mb: int, grad: Tensor | None, *, defer_weights: bool) -> Tensor | None:
        """As in ``Stage``."""
        with self.turn:
            return self.stage.backward(mb, grad, defer_weights=defer_weights)

    def weights(self, mb: int) -> None:
        """As in ``Stage``."""
        with self.turn:
            self.stage.weights(mb)

    def recompute(self, mb: int) -> None:
        """As in ``Stage``."""
        with self.turn:
            self.stage.recompute(mb)

    @property
    def unfinished(self) -> tuple[int, ...]:
        """As in ``Stage``."""
        return self.stage.unfinished


class Unordered:
    """A transport whose messages do not wait for the work that makes them."""

    def __init__(self, transport: Transport) -> None:
        self._transport, self.rank = transport, transport.rank
        self._idle = torch.cuda.Stream()

    def send(self, transfer: Transfer, tensor: Tensor) -> None:
        """The message's event is that of a stream on which nothing runs."""
        with torch.cuda.stream(self._idle):
            self._transport.send(transfer, tensor)

    def receive(self, transfer: Transfer, message: Message) -> Receipt:
        """As in ``Transport``."""
        return self._transport.receive(transfer, message)

    def finish(self) -> None:
        """As in ``Transport``."""
        self._transport.finish()
