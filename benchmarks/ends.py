"""Into the n streams and out of them, as implementations that kernels.py measures."""

import torch
from implementations import RMS_EPS, Implementation, Operands
from torch import Tensor

from mhc_megatron import kernels
from mhc_megatron.kernels import reference

EPS = 1e-6
OPERATIONS = ("expand", "contract_mean", "contract_learned")


def end(data: Operands, operation: str, backend: str) -> Implementation:
    """One of ``OPERATIONS``; the embedding is the operands' branch."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in _values(data, operation).items()
    }
    keywords = _keywords(data, operation)

    def forward() -> list[Tensor]:
        return [getattr(kernels, operation)(*leaves.values(), **keywords, backend=backend)]

    package = "mhc_megatron" if backend == "triton" else "reference"
    gradients = [data.grad_streams if operation == "expand" else data.grad_u]
    return Implementation(
        f"{package}.{operation}", False, leaves, forward, gradients, {}, end=operation
    )


def floor_bytes(tokens: int, channels: int, n: int, itemsize: int, *, operation: str) -> list[int]:
    """Of forward, backward and both: each state once, phi in each and its gradient once."""
    forward = backward = n + 1
    phi = 0
    if operation == "contract_learned":
        # Streams and gradient of the sum read, gradient of the streams written.
        backward, phi = 2 * n + 1, 4 * n * n * channels
    figures = [tokens * channels * itemsize * forward + phi]
    figures.append(tokens * channels * itemsize * backward + 2 * phi)
    return [*figures, sum(figures)]


def float64_truth(data: Operands, operation: str) -> dict[str, Tensor]:
    """The output and the gradients of the reference."""
    values = _values(data, operation)
    leaves = {name: value.double().requires_grad_() for name, value in values.items()}
    out = getattr(reference, operation)(*leaves.values(), **_keywords(data, operation))
    grad = data.grad_streams if operation == "expand" else data.grad_u
    found = torch.autograd.grad(out, list(leaves.values()), grad.double())
    return {"out": out.detach(), **{f"d_{n}": g for n, g in zip(leaves, found, strict=True)}}


def _values(data: Operands, operation: str) -> dict[str, Tensor]:
    if operation == "expand":
        return {"hidden": data.branch}
    if operation == "contract_mean":
        return {"streams": data.streams}
    n = data.streams.shape[1]
    values = {"weight": data.weight[:n], "scale": data.alphas[:1], "bias": data.bias[:n]}
    return {"streams": data.streams, **values}


def _keywords(data: Operands, operation: str) -> dict[str, float]:
    if operation == "expand":
        return {"num_streams": data.streams.shape[1]}
    return {"rms_eps": RMS_EPS, "eps": EPS} if operation == "contract_learned" else {}
