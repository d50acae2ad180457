"""Everything that can be measured, by name, and its outputs and gradients against float64."""

from collections.abc import Callable

import ends
import torch
from implementations import (
    PEERS,
    RMS_EPS,
    Implementation,
    Operands,
    boundary,
    compiled_pair,
    options,
    pair,
)
from torch import Tensor

from mhc_megatron.kernels import PackedMappings, compositions, rms_norm
from mhc_megatron.kernels.triton.tiles import Tiles

Build = Callable[[Operands], Implementation]
OURS = (
    "post_pre",
    "norm-inside",
    "norm-after",
    "single_pass",
    "pre+post",
    "reference",
    "torch.compile",
)
ENDS = (*ends.OPERATIONS, *(f"reference.{operation}" for operation in ends.OPERATIONS))


def builds_with(tiles: Tiles | None) -> dict[str, Build]:
    """Everything that can be measured; ``tiles`` is for the kernels of ``post_pre``."""
    return {
        "post_pre": lambda data: boundary(data, "post_pre", "triton", tiles=tiles),
        "norm-inside": lambda data: boundary(
            data, "post_pre", "triton", tiles=tiles, norm="inside"
        ),
        "norm-after": lambda data: boundary(data, "post_pre", "triton", tiles=tiles, norm="after"),
        "single_pass": lambda data: boundary(data, "single_pass", "triton", tiles=tiles),
        "pre+post": lambda data: pair(data, "triton"),
        "reference": lambda data: pair(data, "reference"),
        "torch.compile": compiled_pair,
        **PEERS,
        **{
            name: lambda data, operation=operation, backend=backend: ends.end(
                data, operation, backend
            )
            for operation in ends.OPERATIONS
            for name, backend in (
                (operation, "triton"),
                (f"reference.{operation}", "reference"),
            )
        },
    }


def float64_truth(data: Operands, built: Implementation, stored: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of the composition; the next sublayer reads the stored streams."""
    names = ["streams", "branch", "weight", "alpha_pre", "alpha_post", "alpha_res", "bias"]
    values = [data.streams, data.branch, data.weight, *data.alphas.split(1), data.bias]
    leaves = [value.double().requires_grad_() for value in values]
    x, f, weight, alpha_pre, alpha_post, alpha_res, bias = leaves
    gates = (alpha_pre, alpha_post, alpha_res)
    gradients = [data.grad_streams.double(), data.grad_u.double()]
    norm_weight = None
    if "norm_weight" in built.leaves:
        norm_weight = data.norm_weight.double().requires_grad_()
        names, leaves = [*names, "norm_weight"], [*leaves, norm_weight]
    if built.fused:
        packed = data.packed.double().requires_grad_()
        mix = PackedMappings(packed, x.shape[1], x.shape[:1])
        streams = compositions.post(x, f, mix)
        read = streams + (stored.double() - streams).detach()
        u, new_mix = compositions.pre(read, weight, gates, bias, options=options())
        if built.name.endswith("single_pass"):
            u = (mix.pre.unsqueeze(-1) * read).sum(1)
        if norm_weight is not None:
            rounded = u.to(data.streams.dtype).double()
            u = rms_norm(u + (rounded - u).detach(), norm_weight, eps=RMS_EPS)
        new_packed = torch.cat([new_mix.pre, new_mix.post, new_mix.res.flatten(1)], dim=1).t()
        outputs = {"streams": streams, "u": u, "mix": new_packed}
        gradients.append(data.grad_packed.double())
        names, leaves = [*names, "mix"], [*leaves, packed]
    else:
        u, mix = compositions.pre(x, weight, gates, bias, options=options())
        outputs = {"streams": compositions.post(x, f, mix), "u": u}
    found = torch.autograd.grad(list(outputs.values()), leaves, gradients)
    truth = {name: value.detach() for name, value in outputs.items()}
    truth.update({f"d_{name}": grad for name, grad in zip(names, found, strict=True)})
    return truth


def check(
    data: Operands, built: Implementation, *, repeats: int = 3
) -> tuple[dict[str, float], bool]:
    """Relative errors by name, and whether ``repeats`` further runs gave the same bits."""

    def once() -> dict[str, Tensor]:
        outputs = built.forward()
        gradients = built.backward(outputs)
        named = dict(zip(built.outputs, [o.detach() for o in outputs], strict=False))
        for name, gradient in zip(built.leaves, gradients, strict=True):
            named["d_mix" if name == "packed" else f"d_{name}"] = gradient
        return named

    first = once()
    same = all(
        torch.equal(value, again[name])
        for again in (once() for _ in range(repeats))
        for name, value in first.items()
    )
    ours = {
        name: built.to_ours.get(name.removeprefix("d_"), lambda t: t)(value)
        for name, value in first.items()
    }
    if built.end is None:
        truth = float64_truth(data, built, ours["streams"])
    else:
        truth = ends.float64_truth(data, built.end)
    for found in (ours, truth):
        gates = [found.pop(name) for name in list(found) if name.startswith("d_alpha_")]
        if gates:
            found["d_alpha"] = torch.stack([gate.double().flatten() for gate in gates])
    errors = {}
    for name, expected in truth.items():
        if name in ours and ours[name].shape == expected.shape:
            error = (ours[name].double() - expected).norm() / expected.norm()
            errors[name] = float(f"{float(error):.2e}")
    return errors, same
