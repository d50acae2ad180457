"""What Megatron's DDP is told of a gradient that is in ``main_grad`` already."""

import pytest
import torch

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.hyper_connection import HyperConnection


def connection() -> HyperConnection:
    made = HyperConnection(
        MHCConfig(backend="reference"),
        hidden_size=8,
        sublayer=0,
        gradient_accumulation_fusion=True,
    )
    torch.manual_seed(1)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def backward(made: HyperConnection) -> torch.Tensor:
    """Of one pre and post; returns phi's ``main_grad``, if there is one."""
    torch.manual_seed(2)
    streams = torch.randn(3, 2, 32)
    u, mix = made.pre(streams)
    (made.post(streams, u.tanh(), mix) ** 2).sum().backward()
    return getattr(made.mapping_proj.weight, "main_grad", None)


def test_without_ddp_the_gradient_is_returned() -> None:
    made = connection()
    assert backward(made) is None
    assert made.mapping_proj.weight.grad.norm() > 0


def test_without_hooks_there_is_no_gradient_but_in_the_buffer() -> None:
    plain, made = connection(), connection()
    backward(plain)
    made.mapping_proj.weight.main_grad = torch.zeros(24, 32)
    assert torch.equal(backward(made), plain.mapping_proj.weight.grad)
    assert made.mapping_proj.weight.grad is None
    for name, parameter in plain.named_parameters():
        if "mapping_proj" not in name:
            assert torch.equal(made.get_parameter(name).grad, parameter.grad), name


@pytest.mark.parametrize("zero", [False, True])
def test_hooks_find_a_gradient_and_that_it_was_added(zero: bool) -> None:
    made = connection()
    weight = made.mapping_proj.weight
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(24, 32), False
    weight.zero_out_wgrad = zero
    assert backward(made).norm() > 0
    assert weight.grad_added_to_main_grad
    assert weight.grad.shape == weight.shape
    assert not zero or not weight.grad.any()


def test_another_reader_of_phi_adds_its_gradient_too() -> None:
    made = connection()
    weight = made.mapping_proj.weight
    weight.main_grad = torch.zeros(24, 32)
    (3 * made.mapping_proj()[0]).sum().backward()
    assert torch.equal(weight.main_grad, torch.full((24, 32), 3.0))


def test_fsdp_is_refused() -> None:
    made = connection()
    made.mapping_proj.weight.__fsdp_param__ = True
    with pytest.raises(UserError, match=r"gradient_accumulation_fusion=True .* set it to False"):
        backward(made)
