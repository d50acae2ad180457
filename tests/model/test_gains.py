"""Gain magnitudes against closed forms. Equality throughout unless a rounding is named."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from mhc_megatron.gains import composite_products, gain_magnitudes


def logarithms(*values: float) -> object:
    """Natural logarithms, to the last bit or two: torch's log and math.log are different code."""
    return pytest.approx([math.log(value) for value in values], rel=1e-15)


def permutation(*order: int) -> Tensor:
    """Row o reads stream ``order[o]``."""
    return torch.eye(len(order), dtype=torch.float64)[list(order)]


def test_identity_neither_amplifies_nor_attenuates() -> None:
    gains = gain_magnitudes(torch.eye(4).expand(6, 4, 4))
    for curves in (gains.single, gains.composite):
        assert curves.forward == curves.backward == [1.0] * 6
        assert curves.log_column == [0.0] * 6


def test_diagonal_matrices_multiply_their_entries() -> None:
    maps = torch.stack([torch.diag(torch.tensor([2.0, 0.5])), torch.diag(torch.tensor([4.0, 2.0]))])
    gains = gain_magnitudes(maps)
    assert gains.single.forward == gains.single.backward == [2.0, 4.0]
    assert gains.single.log_column == logarithms(2, 4)
    # The product is diag(8, 1); the composite from the last sublayer is that sublayer alone.
    assert gains.composite.forward == gains.composite.backward == [8.0, 4.0]
    assert gains.composite.log_column == logarithms(8, 4)


@pytest.mark.parametrize("num_streams", [1, 2, 3])
def test_permutations_keep_every_sum_at_one(num_streams: int) -> None:
    orders = list(itertools.permutations(range(num_streams)))
    gains = gain_magnitudes(torch.stack([permutation(*order) for order in orders]))
    for curves in (gains.single, gains.composite):
        assert curves.forward == curves.backward == [1.0] * len(orders)
        assert curves.log_column == [0.0] * len(orders)


def test_products_of_doubly_stochastic_mappings_stay_at_one() -> None:
    weights = torch.rand(40, 24, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    basis = torch.stack([permutation(*order) for order in itertools.permutations(range(4))])
    maps = torch.einsum("lp,pij->lij", weights / weights.sum(-1, keepdim=True), basis)
    gains = gain_magnitudes(maps)
    # Forty products of sums of 24 float64 terms: rounding of a few units in the last place each.
    near = pytest.approx([1.0] * 40, abs=1e-13)
    assert gains.composite.forward == near and gains.composite.backward == near
    assert max(gains.composite.log_column) < 1e-13


def test_rows_are_forward_and_columns_backward() -> None:
    gains = gain_magnitudes(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]))
    assert gains.single.forward == [3.0]
    assert gains.single.backward == [3.0]
    gains = gain_magnitudes(torch.tensor([[[1.0, 2.0], [3.0, 1.0]]]))
    assert gains.single.forward == [4.0]  # row 1
    assert gains.single.backward == [4.0]  # column 0
    gains = gain_magnitudes(torch.tensor([[[5.0, 5.0], [0.0, 0.0]]]))
    assert gains.single.forward == [10.0]
    assert gains.single.backward == [5.0]


def test_the_sum_comes_before_the_absolute_value() -> None:
    gains = gain_magnitudes(torch.tensor([[[3.0, -1.0], [-5.0, 1.0]]]))
    assert gains.single.forward == [4.0]  # |-5 + 1|, not 5 + 1
    assert gains.single.backward == [2.0]  # |3 - 5|, not 3 + 5


def test_the_later_sublayer_stands_on_the_left() -> None:
    early = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    late = torch.tensor([[1.0, 0.0], [10.0, 1.0]], dtype=torch.float64)
    maps = torch.stack([early, late])
    assert torch.equal(composite_products(maps), torch.stack([late @ early, late]))
    # late @ early = [[1, 1], [10, 11]]; early @ late would be [[11, 1], [10, 1]].
    gains = gain_magnitudes(maps)
    assert gains.composite.forward == [21.0, 11.0]
    assert gains.composite.backward == [12.0, 11.0]


def test_three_factors_keep_their_order() -> None:
    maps = torch.randint(-3, 4, (3, 4, 4), generator=torch.Generator().manual_seed(3))
    maps = maps.to(torch.float64)  # integers: products are exact in any order of evaluation
    expected = torch.stack([maps[2] @ maps[1] @ maps[0], maps[2] @ maps[1], maps[2]])
    assert torch.equal(composite_products(maps), expected)


def test_attenuation_shows_in_the_logarithm_though_the_maximum_hides_it() -> None:
    gains = gain_magnitudes(torch.tensor([[[1.0, 0.0], [0.0, 0.125]]]).expand(3, 2, 2))
    assert gains.composite.forward == gains.composite.backward == [1.0] * 3
    assert gains.single.log_column == logarithms(8, 8, 8)
    assert gains.composite.log_column == logarithms(512, 64, 8)


def test_columns_that_cancel_are_infinitely_attenuated() -> None:
    gains = gain_magnitudes(torch.tensor([[[1.0, 1.0], [-1.0, 1.0]]]))
    assert gains.single.log_column == [math.inf]


def test_what_is_not_finite_stays_visible() -> None:
    maps = torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    maps[0, 0, 1] = math.nan
    gains = gain_magnitudes(maps)
    for curves in (gains.single, gains.composite):
        for values in (curves.forward, curves.backward, curves.log_column):
            assert math.isnan(values[0]) and values[1] in (0.0, 1.0)


def test_an_overflowing_product_is_infinite_not_clipped() -> None:
    gains = gain_magnitudes(torch.full((3, 1, 1), 1e200, dtype=torch.float64))
    assert gains.composite.forward == gains.composite.backward == [math.inf, math.inf, 1e200]
    assert gains.composite.log_column[0] == math.inf


def test_float32_input_is_multiplied_in_float64() -> None:
    gains = gain_magnitudes(torch.full((8, 1, 1), 2.0**40))
    assert gains.composite.forward[0] == 2.0**320  # float32 ends at 2**128


def test_no_sublayers_give_empty_curves() -> None:
    gains = gain_magnitudes(torch.empty(0, 4, 4))
    assert gains.single.forward == gains.composite.log_column == []
