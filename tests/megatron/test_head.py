"""The configured backend reaches a model's ends: the embedding's expansion, the contraction."""

import pytest
import torch
from helpers.oracle import SUMMATION_ORDER
from helpers.pool import WorkerPool
from helpers.small_gpt import build, losses_of

from mhc_megatron.config import Backend, Contraction, MHCConfig
from mhc_megatron.launch.environment import World
from mhc_megatron.training.config import ModelConfig, TrainConfig
from mhc_megatron.training.runtime import distributed_runtime


def nodes_of(loss: torch.Tensor) -> set[str]:
    """Names of the functions whose backward the loss reaches."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return {node.name() for node in seen}


def one_layer(
    rank: int, world_size: int, contraction: Contraction, backend: Backend
) -> tuple[float, dict[str, torch.Tensor], set[str]]:
    """The loss, every parameter's gradient and the graph's nodes at random parameters."""
    config = TrainConfig(
        model=ModelConfig(
            num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, seq_length=8
        ),
        mhc=MHCConfig(
            num_streams=2, contraction=contraction, backend=backend, sinkhorn_iterations=2
        ),
        micro_batch_size=1,
        global_batch_size=1,
    )
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        model = build(config)
        loss = losses_of(model, 0).sum()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        return loss.item(), gradients, nodes_of(loss)


@pytest.mark.parametrize("contraction", ["mean", "sum", "learned"])
def test_the_kernels_of_the_ends_equal_the_reference(
    contraction: Contraction, workers: WorkerPool
) -> None:
    """At random parameters; without a GPU in Triton's interpreter."""
    [(expected, gradients, plain)] = workers.run(one_layer, 1, contraction, "reference")
    [(loss, fused, nodes)] = workers.run(one_layer, 1, contraction, "triton")
    ends = {"ExpandBackward", f"Contract{'Learned' * (contraction == 'learned')}Backward"}
    assert ends <= nodes and not ends & plain
    assert abs(loss / expected - 1) <= 1e-6
    assert fused.keys() == gradients.keys()
    learned = {name for name in gradients if "contraction" in name}
    assert len(learned) == (3 if contraction == "learned" else 0)
    # The first sublayer's streams are equal, so its H_res changes nothing.
    nothing = gradients.pop("decoder.layers.0.self_attention_hyper_connection.alpha_res")
    assert nothing.abs() < 1e-7
    for name, gradient in gradients.items():
        assert gradient.norm() > 1e-5, name
        # A gate's is one number, and with few tokens more of it cancels.
        tolerance = SUMMATION_ORDER * (10 if gradient.numel() == 1 else 1)
        assert (fused[name] - gradient).norm() <= tolerance * gradient.norm(), name
