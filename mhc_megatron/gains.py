"""How much the residual mappings amplify or attenuate a signal: the Amax Gain Magnitude.

The mHC paper (section 5, "Amax Gain Magnitude") takes the token-averaged matrices H_res and
measures, of each single mapping and of the products over several sublayers, the maximum absolute
row sum (forward) and the maximum absolute column sum (backward). A maximum hides attenuation: a
matrix with column sums 1 and 0.01 measures 1. The third number, the largest |log |column sum||,
shows both directions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GainCurves:
    """Three numbers per sublayer, in depth order.

    Attributes:
        forward: ``max_o |sum_i H[o, i]|``: what becomes of equal streams, at most.
        backward: ``max_i |sum_o H[o, i]|``: the same of their gradient.
        log_column: ``max_i |log |sum_o H[o, i]||``: 0 if every column sum is +-1, infinite if one
            vanishes.
    """

    forward: list[float]
    backward: list[float]
    log_column: list[float]


@dataclass(frozen=True, kw_only=True)
class Gains:
    """The gain magnitudes of a model.

    Attributes:
        single: of each sublayer's own mapping.
        composite: of everything from a sublayer to the end, ``H[L-1] ... H[l+1] H[l]``.
    """

    single: GainCurves
    composite: GainCurves


def gain_magnitudes(maps: Tensor) -> Gains:
    """Gain magnitudes of the mappings H_res and of their products to the last sublayer.

    The sum is taken first and its absolute value afterwards, so that entries of opposite sign
    cancel as they do for equal streams. Where H_res is not negative (mHC) this is the matrix's
    infinity norm and 1-norm; for unconstrained hyper-connections it is at most that.

    Args:
        maps: H_res per sublayer in depth order, averaged over tokens beforehand, [L, n, n], any
            floating dtype; ``maps[l, o, i]`` is the weight of stream i in the new stream o.

    Returns:
        Float64 results as lists of L numbers. A number that is not finite (an overflowing
        product, a NaN in a mapping) is returned as it is, not replaced.
    """
    assert maps.ndim == 3 and maps.shape[-1] == maps.shape[-2], tuple(maps.shape)
    maps_Lnn = maps.detach().to("cpu", torch.float64)
    return Gains(single=_curves(maps_Lnn), composite=_curves(composite_products(maps_Lnn)))


def composite_products(maps: Tensor) -> Tensor:
    """``H[L-1] ... H[l+1] H[l]`` for every l.

    Args:
        maps: H_res per sublayer in depth order, [L, n, n].

    Returns:
        [L, n, n], in the dtype of ``maps``; the last one is ``maps[L-1]`` itself.
    """
    products = [torch.eye(maps.shape[-1], dtype=maps.dtype)]
    for res_nn in maps.flip(0):
        products.append(products[-1] @ res_nn)
    # The identity stays in when there is no sublayer: an empty list has no shape to stack.
    return torch.stack(products).flip(0)[:-1]


def _curves(maps_Lnn: Tensor) -> GainCurves:
    forward_Ln = maps_Lnn.sum(dim=-1).abs()
    backward_Ln = maps_Lnn.sum(dim=-2).abs()
    # amax hands a NaN on.
    return GainCurves(
        forward=forward_Ln.amax(dim=-1).tolist(),
        backward=backward_Ln.amax(dim=-1).tolist(),
        log_column=backward_Ln.log().abs().amax(dim=-1).tolist(),
    )
