"""The module: dtypes that survive casts, initial mappings, the observer."""

from typing import Any

import pytest
import torch

from mhc_megatron import kernels
from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig, Projection, Variant
from mhc_megatron.hyper_connection import HyperConnection, mappings_to, normalises
from mhc_megatron.streams import Contraction, expand_streams

PROJECTIONS: list[Projection] = [
    "sinkhorn",
    "sinkhorn_v4",
    "permutation",
    "identity",
    "unconstrained",
]


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_casts_to_half_precision_lose_no_bit(cast: str) -> None:
    connection = HyperConnection(MHCConfig(), hidden_size=8, sublayer=0)
    torch.nn.init.normal_(connection.mapping_proj.weight)
    before = {name: value.clone() for name, value in connection.state_dict().items()}
    getattr(torch.nn.Sequential(connection), cast)()
    after = connection.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {value.dtype for value in after.values()} == {torch.float32}


def test_wider_casts_and_moves_pass_through() -> None:
    connection = HyperConnection(MHCConfig(), hidden_size=8, sublayer=0)
    assert connection.double().bias.dtype == torch.float64
    assert connection.to("meta").bias.is_meta


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("num_streams", [1, 2, 3, 4])
def test_initial_mappings_are_a_plain_residual(projection: Projection, num_streams: int) -> None:
    mhc = MHCConfig(projection=projection, num_streams=num_streams)
    for sublayer in range(2 * num_streams):
        connection = HyperConnection(mhc, hidden_size=8, sublayer=sublayer)
        streams = torch.randn(3, 2, num_streams * 8)
        _, mix = connection.pre(streams)
        home = sublayer % num_streams
        assert mix.pre.argmax(-1).unique().tolist() == [home]
        torch.testing.assert_close(mix.post, torch.ones(3, 2, num_streams))
        # Rows sum to 1, up to float32 rounding (and V4's floor).
        torch.testing.assert_close(
            mix.res.sum(-1), torch.ones(3, 2, num_streams), atol=1e-5, rtol=0
        )
        assert mix.res.diagonal(dim1=-2, dim2=-1).min() > 0.98


def test_identity_has_no_residual_parameters() -> None:
    connection = HyperConnection(MHCConfig(projection="identity"), hidden_size=8, sublayer=0)
    assert connection.alpha_res is None
    assert connection.bias.shape == (8,)
    assert connection.mapping_proj.weight.shape == (8, 32)


def test_pre_and_post_keep_the_dtype_and_shape_of_the_streams() -> None:
    connection = HyperConnection(MHCConfig(), hidden_size=8, sublayer=0)
    streams = torch.randn(3, 2, 32, dtype=torch.bfloat16)
    branch_input, mix = connection.pre(streams)
    assert branch_input.shape == (3, 2, 8) and branch_input.dtype == torch.bfloat16
    assert {part.dtype for part in mix} == {torch.float32}
    following = connection.post(streams, branch_input, mix)
    assert following.shape == streams.shape and following.dtype == torch.bfloat16


@pytest.mark.parametrize("variant", ["two_pass", "single_pass"])
def test_boundaries_of_the_kernels_follow_each_other_without_views(variant: Variant) -> None:
    """Each view is a node of autograd forward and backward, at every boundary."""
    mhc = MHCConfig(backend="triton", variant=variant)
    first, second, third = (HyperConnection(mhc, hidden_size=8, sublayer=i) for i in range(3))
    streams = torch.randn(3, 2, 32, requires_grad=True)
    branch, mix = first.pre(streams)
    middle, branch, mix = first.post_pre(streams, branch, mix, second)
    last, _, _ = second.post_pre(middle, branch, mix, third)
    assert middle.grad_fn is not None
    assert last.grad_fn is not None
    assert last.grad_fn.next_functions[0][0] is middle.grad_fn


def test_the_observer_sees_the_residual_mapping() -> None:
    connection = HyperConnection(MHCConfig(), hidden_size=8, sublayer=0)
    seen: list[torch.Tensor] = []
    connection.observer = mappings_to(seen.append)
    _, mix = connection.pre(torch.randn(3, 2, 32))
    [mapping] = seen
    assert torch.equal(mapping, mix.res) and not mapping.requires_grad


def test_expansion_lays_whole_streams_one_after_another() -> None:
    hidden = torch.arange(6.0).reshape(1, 2, 3)
    expanded = expand_streams(hidden, 2)
    assert torch.equal(expanded, torch.cat([hidden, hidden], dim=-1))


@pytest.mark.parametrize("contraction", ["mean", "sum", "learned"])
def test_equal_streams_contract_to_a_multiple_of_one(contraction: str) -> None:
    head = Contraction(MHCConfig(contraction=contraction), hidden_size=3)  # type: ignore[arg-type]
    hidden = torch.randn(2, 2, 3)
    factor = {"mean": 1.0, "sum": 4.0, "learned": 4 * (0.5 + 1e-6)}[contraction]
    torch.testing.assert_close(head(expand_streams(hidden, 4)), factor * hidden)


def test_who_applies_the_norm_is_found_once_for_each_kind_of_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection = HyperConnection(MHCConfig(backend="triton"), hidden_size=8, sublayer=0)
    norm, streams = BranchNorm(8), torch.randn(3, 2, 32)
    _, before = connection.pre(streams, norm=norm)
    asked: list[torch.dtype] = []

    def choose_backend(x: torch.Tensor, **_: Any) -> kernels.BackendChoice:
        asked.append(x.dtype)
        return kernels.BackendChoice("reference", "none of the kernels is to run")

    monkeypatch.setattr(kernels, "choose_backend", choose_backend)
    _, again = connection.pre(streams, norm=norm)
    assert normalises(before) and normalises(again)
    for _ in range(2):
        _, other = connection.pre(streams.bfloat16(), norm=norm)
        assert not normalises(other)
    assert asked == [torch.bfloat16]
