"""Jobs for a worker pool of one: ``ForwardBackward`` on virtual ranks, and what it refuses."""

from collections.abc import Iterator
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from helpers.layouts import VOCAB, sample
from helpers.oracle import DENSE, run_config
from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.cpu_runtime import cpu_runtime_in_thread
from mhc_megatron.megatron.schedule import ForwardBackward
from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.in_process import Exchange, InProcessTransport, run_ranks
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import stage_chunk, transformer_config
from mhc_megatron.training.pipeline import pipeline_schedule
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.step import forward_step

SINGLE = TrainConfig(micro_batch_size=1, global_batch_size=1)
LENGTH = 16


class Counted:
    """An endless corpus that knows how many samples it gave."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.taken += 1
        return sample(self.taken - 1, LENGTH)


def reports_of_steps(
    rank: int, world_size: int, name: str, num_steps: int
) -> tuple[list[list[float]], list[int]]:
    """Losses per token of every step, in the order of the micro-batches, and samples taken.

    Two virtual ranks whose chunks keep one iterator each for all steps, as a training loop does.
    """
    layout = {"pipeline": 2, "schedule": name}
    config = run_config(DENSE, layout, global_batch_size=4)
    schedule = pipeline_schedule(config)
    with distributed_runtime(SINGLE, World(rank=rank, local_rank=rank, world_size=world_size)):
        # Threads share Megatron's tracker of random states; the one for inference has none.
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        megatron_config = transformer_config(config)
        megatron_config.finalize_model_grads_func = None
        held = [schedule.placement.stages_on(virtual) for virtual in range(2)]
        models = [
            [stage_chunk(config, megatron_config, stage, vocab_size=VOCAB) for stage in stages]
            for stages in held
        ]
        sources = [[Counted() for _ in stages] for stages in held]

        def run(transport: InProcessTransport) -> list[list[float]]:
            forward_backward = ForwardBackward(
                schedule, transport, hidden_parts=config.mhc.hidden_parts
            )
            with cpu_runtime_in_thread():
                steps = [
                    forward_backward(
                        forward_step_func=forward_step,
                        data_iterator=sources[transport.rank],
                        model=models[transport.rank],
                        num_microbatches=schedule.num_mb,
                        seq_length=LENGTH,
                        micro_batch_size=1,
                        forward_only=step == num_steps - 1,
                    )
                    for step in range(num_steps)
                ]
            return [[(r["lm"][0] / r["lm"][1]).item() for r in step] for step in steps]

        first, second = run_ranks(run, 2)
        losses = [a + b for a, b in zip(first, second, strict=True)]
        if schedule.placement.num_copies == 2:  # the first half ends on the last rank
            losses = [b + a for a, b in zip(first, second, strict=True)]
        return losses, [source.taken for rank in sources for source in rank]


def refusals(rank: int, world_size: int) -> dict[str, str]:
    """What ``ForwardBackward`` says, by what it was given."""
    found = {}
    with distributed_runtime(SINGLE, World(rank=rank, local_rank=rank, world_size=world_size)):
        exchange = Exchange(num_ranks=4)
        config = run_config(DENSE)

        def attempt(
            what: str, *, schedule: str = "gpipe", num_ranks: int = 1, num_mb: int = 8, **given: Any
        ) -> None:
            options = {name: given.pop(name) for name in list(given) if name not in ARGUMENTS}
            megatron_config = transformer_config(config)
            chunk = stage_chunk(config, megatron_config, 0, vocab_size=VOCAB)
            for option, value in options.items():
                setattr(megatron_config, option, value)
            if what == "tied":
                chunk.share_embeddings_and_output_weights = True
            if what == "queued":  # as Transformer Engine's modules, inside Megatron's DDP
                chunk.need_backward_dw = lambda: True
                chunk.ddp_config = DistributedDataParallelConfig()
            try:
                forward_backward = ForwardBackward(
                    generate(schedule, num_ranks=num_ranks, num_mb=num_mb),
                    InProcessTransport(exchange, 0),
                )
                forward_backward(
                    forward_step_func=forward_step,
                    data_iterator=[Counted() for _ in range(num_ranks)],
                    model=[chunk] * num_ranks,
                    seq_length=LENGTH,
                    micro_batch_size=1,
                    **{"num_microbatches": num_mb, **given},
                )
            except UserError as error:
                found[what] = str(error)

        attempt("copies", schedule="dualpipe", num_ranks=4)
        attempt(
            "global_aux_loss",
            schedule="dualpipe",
            num_ranks=2,
            pipeline_model_parallel_size=2,
            moe_router_load_balancing_type=["aux_loss", "global_aux_loss"],
        )
        attempt("number", num_microbatches=3)
        attempt("stages", pipeline_model_parallel_size=2)
        attempt("shapes", adjust_tensor_shapes_fn=print)
        attempt("decoder", decoder_seq_length=8)
        attempt("variable", variable_seq_lengths=True)
        attempt("queued")
        attempt("overlap", grad_sync_func=print)
        attempt("tied")
    return found


ARGUMENTS = ("num_microbatches", "adjust_tensor_shapes_fn", "decoder_seq_length")
