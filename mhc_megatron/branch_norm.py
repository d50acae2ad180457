"""The RMSNorm of a branch, which a hyper-connection can apply for it."""

import torch
from torch import Tensor


class BranchNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm, whose ``weight`` [C] can be read by calling it without input.

    Where the kernels run, ``HyperConnection.pre`` applies the norm in their pass. Parameters are
    then still read through a call of the module that owns them; see ``HyperConnection.forward``.
    """

    def forward(self, hidden: Tensor | None = None) -> Tensor:
        """The normalised ``hidden`` [..., C]; without it the weight [C]."""
        return self.weight if hidden is None else super().forward(hidden)
