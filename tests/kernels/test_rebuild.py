"""What a rebuild writes is what the forward wrote, bit for bit."""

from dataclasses import replace

import pytest
import torch
from helpers.fused import Case, operands
from torch import Tensor

from mhc_megatron import kernels
from mhc_megatron.kernels import Rebuilt
from mhc_megatron.kernels.backends import Backend
from mhc_megatron.kernels.triton.launch import REBUILT_TOGETHER

BACKENDS: list[Backend] = ["reference", "triton"]


def forward(case: Case, num_sublayers: int, backend: Backend, device: torch.device) -> tuple:
    """States, branch inputs, branches, biases and mappings of sublayers one after the other.

    The first pair of sublayers goes through ``pre`` and ``post``, the rest through ``post_pre``:
    a rebuild does not know which made what it rebuilds. Every second branch has a bias.
    """

    def mappings_of(sublayer: int) -> tuple[tuple, dict]:
        torch.manual_seed(sublayer)
        leaves = operands(replace(case, operation="pre"), device)
        gates = (leaves["alpha_pre"], leaves["alpha_post"], leaves["alpha_res"])
        keywords = {"options": case.options, "backend": backend}
        return (leaves["weight"], gates, leaves["bias"]), keywords

    streams = operands(case, device)["streams"]
    positional, keywords = mappings_of(0)
    u, mix = kernels.pre(streams, *positional, **keywords)
    states, inputs, mixes, branches, biases = [streams], [u], [mix], [], []
    for sublayer in range(1, num_sublayers):
        branches.append(u.roll(1, -1).tanh())
        biases.append(torch.randn_like(u.new_empty(case.channels)) if sublayer % 2 else None)
        positional, keywords = mappings_of(sublayer)
        if sublayer == 1:
            streams = kernels.post(
                streams, branches[-1], mix, branch_bias=biases[-1], backend=backend
            )
            u, mix = kernels.pre(streams, *positional, **keywords)
        else:
            streams, u, mix = kernels.post_pre(
                streams, branches[-1], mix, *positional, branch_bias=biases[-1], **keywords
            )
        states.append(streams)
        inputs.append(u)
        mixes.append(mix)
    return states, inputs, branches, biases, mixes


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "tokens", "channels", "num_sublayers"),
    [
        (4, 17, 72, 3),
        (3, 5, 40, 1),
        (1, 4, 8, 2),
        (8, 3, 24, 2),
        (2, 3, 8, REBUILT_TOGETHER + 2),
    ],
)
def test_the_same_bits_as_the_forward(
    n: int,
    tokens: int,
    channels: int,
    num_sublayers: int,
    dtype: torch.dtype,
    backend: Backend,
    device: torch.device,
) -> None:
    case = Case(tokens=tokens, n=n, channels=channels, dtype=dtype)
    states, inputs, branches, biases, mixes = forward(case, num_sublayers, backend, device)
    found = kernels.rebuild(states[0], branches, mixes, branch_biases=biases, backend=backend)
    assert equal(found.streams, states[1:])
    assert equal(found.branch_inputs, inputs)
    if branches:  # a changed branch shows
        branches[-1] = branches[-1] + 1
        other = kernels.rebuild(states[0], branches, mixes, branch_biases=biases, backend=backend)
        assert equal(other.streams[:-1], states[1:-1])
        assert not torch.equal(other.streams[-1], states[-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_written_to_given_memory(backend: Backend, device: torch.device) -> None:
    states, inputs, branches, biases, mixes = forward(Case(), 3, backend, device)
    out = Rebuilt([torch.full_like(x, torch.nan) for x in states[1:]],
                  [torch.full_like(u, torch.nan) for u in inputs])  # fmt: skip
    found = kernels.rebuild(
        states[0], branches, mixes, branch_biases=biases, out=out, backend=backend
    )
    assert found is out
    assert equal(out.streams, states[1:]) and equal(out.branch_inputs, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_inputs_have_the_bits_of_the_forward(
    dtype: torch.dtype, backend: Backend, device: torch.device
) -> None:
    """Of three sublayers the first, by ``pre``, and the last, by ``post_pre``, are normalised."""
    case = Case(norm=True, dtype=dtype, tokens=17, channels=72)

    def mappings_of(sublayer: int, norm: bool) -> tuple[tuple, dict, Tensor | None]:
        torch.manual_seed(sublayer)
        leaves = operands(replace(case, operation="pre"), device)
        gates = (leaves["alpha_pre"], leaves["alpha_post"], leaves["alpha_res"])
        keywords = {"options": case.options, "backend": backend}
        weight = leaves["norm_weight"] if norm else None
        if norm:
            keywords |= {"norm_weight": weight, "norm_eps": 0.1}
        return (leaves["weight"], gates, leaves["bias"]), keywords, weight

    streams = operands(case, device)["streams"]
    positional, keywords, weight = mappings_of(0, True)
    u, mix = kernels.pre(streams, *positional, **keywords)
    states, inputs, mixes, branches, weights = [streams], [u], [mix], [], [weight]
    for sublayer, norm in ((1, False), (2, True)):
        branches.append(u.roll(1, -1).tanh())
        positional, keywords, weight = mappings_of(sublayer, norm)
        streams, u, mix = kernels.post_pre(states[-1], branches[-1], mix, *positional, **keywords)
        states.append(streams)
        inputs.append(u)
        mixes.append(mix)
        weights.append(weight)
    keywords = {"norm_weights": weights, "norm_eps": 0.1, "backend": backend}
    found = kernels.rebuild(states[0], branches, mixes, **keywords)
    assert equal(found.streams, states[1:])
    assert equal(found.branch_inputs, inputs)
    keywords["norm_weights"] = [weights[0], None, weights[0]]  # another weight shows
    other = kernels.rebuild(states[0], branches, mixes, **keywords)
    assert equal(other.branch_inputs[:2], inputs[:2])
    assert not torch.equal(other.branch_inputs[2], inputs[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: Backend, device: torch.device) -> None:
    states, _, branches, biases, mixes = forward(Case(tokens=0), 2, backend, device)
    found = kernels.rebuild(states[0], branches, mixes, branch_biases=biases, backend=backend)
    assert [tuple(x.shape) for x in found.streams] == [(0, 4, 40)]


def test_wrong_arguments(device: torch.device) -> None:
    states, inputs, branches, biases, mixes = forward(Case(), 3, "reference", device)
    with pytest.raises(ValueError, match="mixes: expected one for each sublayer of the block"):
        kernels.rebuild(states[0], [], [])
    with pytest.raises(ValueError, match="branches: they are of 2 sublayers, the mixes of 3"):
        kernels.rebuild(states[0], branches[:1], mixes)
    with pytest.raises(ValueError, match="branch_biases: they are of 2 sublayers, the mixes of 3"):
        kernels.rebuild(states[0], branches, mixes, branch_biases=biases[:1])
    with pytest.raises(ValueError, match=r"branch: expected shape \(5, 40\), got \(4, 40\)"):
        kernels.rebuild(states[0], [branches[0][:4], branches[1]], mixes)
    with pytest.raises(ValueError, match="streams: they are of 2 sublayers, the mixes of 3"):
        kernels.rebuild(states[0], branches, mixes, out=Rebuilt(states[1:2], inputs))
    weight = torch.ones_like(inputs[0][0])
    with pytest.raises(ValueError, match="norm_weights: they are of 1 sublayers, the mixes of 3"):
        kernels.rebuild(states[0], branches, mixes, norm_weights=[weight])
    with pytest.raises(ValueError, match="norm_eps: expected None without norm_weights, got 1e-06"):
        kernels.rebuild(states[0], branches, mixes, norm_eps=1e-6)
    with pytest.raises(ValueError, match=r"norm_weight: expected shape \(40,\), got \(39,\)"):
        kernels.rebuild(states[0], branches, mixes, norm_weights=[weight[1:], None, None])
    with pytest.raises(ValueError, match="norm_weights: expected None for mixes that pre and"):
        kernels.rebuild(
            states[0], branches, mixes, norm_weights=[weight, None, None], backend="triton"
        )
    transposed = [state.transpose(0, 1).contiguous().transpose(0, 1) for state in states[1:]]
    with pytest.raises(ValueError, match=r"out\.streams: expected contiguous torch\.float32"):
        kernels.rebuild(states[0], branches, mixes, out=Rebuilt(transposed, inputs))
    with pytest.raises(ValueError, match=r"out\.branch_inputs: expected contiguous torch\.float32"):
        narrow = [u.half() for u in inputs]
        kernels.rebuild(states[0], branches, mixes, out=Rebuilt(states[1:], narrow))
