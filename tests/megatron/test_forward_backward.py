"""ForwardBackward in Megatron's place: the data it takes, and the arguments it refuses."""

import pytest
from helpers import one_process
from helpers.pool import WorkerPool


@pytest.mark.parametrize("name", ["zb_h1", "dualpipe_v", "dualpipe"])
def test_every_step_takes_its_samples(name: str, workers: WorkerPool) -> None:
    [(serial, _)] = workers.run(one_process.reports_of_steps, 1, "gpipe", 3)
    [(losses, taken)] = workers.run(one_process.reports_of_steps, 1, name, 3)
    assert set(taken) == {3 * 4}, "each chunk's data stands at the next step"
    # The parameters of a stage are drawn by its number: only models of as many stages are alike.
    if name != "dualpipe_v":
        assert losses == serial
    assert [len(step) for step in losses] == [4, 4, 4]
    assert len({loss for step in losses for loss in step}) == 12


REFUSALS = {
    "copies": "dualpipe holds every stage on 2 of its 4 ranks, which have to be data-parallel "
    "replicas, but Megatron's pipeline has 1 ranks; initialise it with "
    "pipeline_model_parallel_size=2",
    "global_aux_loss": "moe_router_load_balancing_type=['aux_loss', 'global_aux_loss'] does not "
    "combine with dualpipe: the router adds up counts over replicas in its forward, and two copies "
    "of a stage run at different times; use aux_loss or seq_aux_loss",
    "number": "num_microbatches=3, but gpipe was made for 8; make another schedule",
    "stages": "the chunks are built for 2 stages, gpipe has 1; set pipeline_model_parallel_size to "
    "that",
    "shapes": "adjust_tensor_shapes_fn is for Megatron's own pipeline schedules: here the "
    "messages' shape and the transport are the executor's; leave it out",
    "decoder": "decoder_seq_length is for Megatron's own pipeline schedules: here the messages' "
    "shape and the transport are the executor's; leave it out",
    "variable": "variable_seq_lengths does not combine with gpipe: every message has one shape",
    "queued": "the chunks delay weight gradients (delay_wgrad_compute), and their "
    "DistributedDataParallel would not add them up; set "
    "DistributedDataParallelConfig(delay_wgrad_compute=True)",
    "overlap": "grad_sync_func does not combine with gpipe: gradients are reduced after the step: "
    "set overlap_grad_reduce off",
    "tied": "tied embeddings under gpipe: the first and the last stage hold copies whose gradients "
    "Megatron adds between the first and the last rank only; set "
    "share_embeddings_and_output_weights=False",
}


def test_what_it_cannot_honour_is_refused(workers: WorkerPool) -> None:
    [found] = workers.run(one_process.refusals, 1)
    assert found == REFUSALS
