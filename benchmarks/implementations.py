"""One sublayer's pre and post by every implementation that is installed, on the same numbers.

``Pair`` is pre and post of one sublayer, ``Boundary`` post of one and pre of the next: the same
work. Each implementation converts operands into its own layout once, outside what is timed.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import engine
import torch
from torch import Tensor

from mhc_megatron.kernels import MappingOptions, PackedMappings, compositions, functional
from mhc_megatron.kernels.triton.tiles import Tiles

ITERATIONS = 20
RMS_EPS = 1e-6


@dataclass(frozen=True)
class Operands:
    """Random numbers in this package's layouts; ``packed`` are the mappings of a boundary."""

    streams: Tensor
    branch: Tensor
    packed: Tensor
    weight: Tensor
    alphas: Tensor
    bias: Tensor
    norm_weight: Tensor
    grad_streams: Tensor
    grad_u: Tensor
    grad_packed: Tensor


@dataclass(frozen=True)
class Implementation:
    """Ready to run.

    Attributes:
        name: as in the results.
        fused: whether its floor is that of a boundary.
        leaves: what gradients are taken of.
        forward: to [streams, u] or [streams, u, packed].
        gradients: of the outputs.
        to_ours: names of leaves and outputs to functions that restore this package's layout.
        end: the operation, where it leads into the streams or out of them (ends.py).
    """

    name: str
    fused: bool
    leaves: dict[str, Tensor]
    forward: Callable[[], list[Tensor]]
    gradients: list[Tensor]
    to_ours: dict[str, Callable[[Tensor], Tensor]]
    end: str | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return ("streams", "u", "mix") if self.end is None else ("out",)

    def backward(self, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = list(self.leaves.values())
        return engine.gradients(outputs, leaves, self.gradients, retain_graph=True)


def forward_backward(several: Sequence[Implementation]) -> tuple[Tensor, ...]:
    """All forwards, and one backward through them, as through the sublayers of a stage."""
    outputs = [output for one in several for output in one.forward()]
    leaves = [leaf for one in several for leaf in one.leaves.values()]
    gradients = [gradient for one in several for gradient in one.gradients]
    return engine.gradients(outputs, leaves, gradients)


def random_operands(
    tokens: int, n: int, channels: int, dtype: torch.dtype, seed: int, *, device: str = "cuda"
) -> Operands:
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(of)

    num_logits, width = n * (n + 2), n * channels
    res = randn(tokens, n, n).softmax(-1).flatten(1)
    mix = torch.cat([randn(tokens, n).sigmoid(), 2 * randn(tokens, n).sigmoid(), res], dim=1)
    return Operands(
        streams=randn(tokens, n, channels, of=dtype),
        branch=randn(tokens, channels, of=dtype),
        packed=mix.t().contiguous(),
        weight=randn(num_logits, width) * width**-0.5,
        alphas=randn(3),
        bias=randn(num_logits),
        grad_streams=randn(tokens, n, channels, of=dtype),
        grad_u=randn(tokens, channels, of=dtype),
        grad_packed=randn(num_logits, tokens),
        norm_weight=1 + 0.1 * randn(channels, of=dtype),
    )


def options() -> MappingOptions:
    return MappingOptions(iterations=ITERATIONS, rms_eps=RMS_EPS)


def _leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_()


def _leaves(
    data: Operands, *, boundary: bool, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    leaves = {
        "streams": _leaf(data.streams, dtype),
        "branch": _leaf(data.branch, dtype),
        "weight": _leaf(data.weight, dtype),
        "alpha_pre": _leaf(data.alphas[0:1], dtype),
        "alpha_post": _leaf(data.alphas[1:2], dtype),
        "alpha_res": _leaf(data.alphas[2:3], dtype),
        "bias": _leaf(data.bias, dtype),
    }
    if boundary:
        leaves["packed"] = _leaf(data.packed, dtype)
    return leaves


def _gates(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return leaves["alpha_pre"], leaves["alpha_post"], leaves["alpha_res"]


def boundary(
    data: Operands,
    operation: str,
    backend: str,
    *,
    tiles: Tiles | None = None,
    norm: str = "none",
) -> Implementation:
    """``post_pre`` or ``single_pass``; ``norm`` of the next branch: none, inside, or after it."""
    leaves = _leaves(data, boundary=True)
    if norm != "none":
        leaves["norm_weight"] = _leaf(data.norm_weight)
    inside = {"norm_weight": leaves["norm_weight"], "norm_eps": RMS_EPS} if norm == "inside" else {}
    function = getattr(functional, operation)
    mix = PackedMappings(leaves["packed"], data.streams.shape[1], data.streams.shape[:1])

    def forward() -> list[Tensor]:
        streams, u, new_mix = function(
            leaves["streams"],
            leaves["branch"],
            mix,
            leaves["weight"],
            _gates(leaves),
            leaves["bias"],
            options=options(),
            backend=backend,
            tiles=tiles,
            **inside,
        )
        if norm == "after":
            shape = leaves["norm_weight"].shape
            u = torch.nn.functional.rms_norm(u, shape, leaves["norm_weight"], eps=RMS_EPS)
        return [streams, u, new_mix.packed]

    gradients = [data.grad_streams, data.grad_u, data.grad_packed]
    name = f"mhc_megatron.{operation}" + ("" if norm == "none" else f", norm {norm}")
    return Implementation(name, True, leaves, forward, gradients, {})


def pair(data: Operands, backend: str) -> Implementation:
    """``pre`` and ``post`` of one sublayer, whose branch is a constant."""
    leaves = _leaves(data, boundary=False)

    def forward() -> list[Tensor]:
        u, mix = functional.pre(
            leaves["streams"],
            leaves["weight"],
            _gates(leaves),
            leaves["bias"],
            options=options(),
            backend=backend,
        )
        return [functional.post(leaves["streams"], leaves["branch"], mix, backend=backend), u]

    name = "mhc_megatron.pre+post" if backend == "triton" else "reference"
    return Implementation(name, False, leaves, forward, [data.grad_streams, data.grad_u], {})


def compiled_pair(data: Operands) -> Implementation:
    """``torch.compile`` of the reference."""
    eager = pair(data, "reference")
    leaves = eager.leaves

    @torch.compile(fullgraph=True)
    def both(x: Tensor, f: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        u, mix = compositions.pre(x, weight, rest[:3], rest[3], options=options())
        return compositions.post(x, f, mix), u

    def forward() -> list[Tensor]:
        return list(both(*leaves.values()))

    return Implementation("torch.compile", False, leaves, forward, eager.gradients, {})


def tile_kernels_pair(data: Operands) -> Implementation:
    """TileKernels: ``comb[i, o]``, so the res rows of phi and bias are swapped."""
    from tile_kernels.modeling.mhc.functional import mhc_post, mhc_pre

    n = data.streams.shape[1]
    leaves = {
        "streams": _leaf(data.streams.unsqueeze(0)),
        "branch": _leaf(data.branch.unsqueeze(0)),
        "weight": _leaf(_swap(data.weight, n)),
        "alphas": _leaf(data.alphas),
        "bias": _leaf(_swap(data.bias, n)),
    }

    def forward() -> list[Tensor]:
        u, (post_mix, comb_mix) = mhc_pre(
            leaves["streams"],
            leaves["weight"],
            leaves["alphas"],
            leaves["bias"],
            norm_eps=RMS_EPS,
            post_mult_value=2.0,
            sinkhorn_repeat=ITERATIONS,
        )
        return [mhc_post(leaves["branch"], leaves["streams"], post_mix, comb_mix), u]

    return Implementation(
        _versioned("tile-kernels"),
        False,
        leaves,
        forward,
        [data.grad_streams.unsqueeze(0), data.grad_u.unsqueeze(0)],
        {"streams": _first, "branch": _first, "u": _first, "weight": lambda w: _swap(w, n)},
    )


def transformer_engine_pair(data: Operands) -> Implementation:
    """Transformer Engine's Triton kernels: streams [s, b, C, n], ``h_res[i, o]``, n = 4.

    With split-K, its faster choice, whose sums are atomic, and without its float32 buffer for the
    gradients of the streams, which is slower.
    """
    from transformer_engine.pytorch.triton import mhc

    tokens, n, channels = data.streams.shape
    layout = _swap(data.weight, n).unflatten(1, (n, channels)).transpose(1, 2).flatten(1)
    leaves = {
        "streams": _leaf(data.streams.transpose(1, 2).contiguous().unsqueeze(1)),
        "branch": _leaf(data.branch.unsqueeze(1)),
        "weight": _leaf(layout.contiguous()),
        "alphas": _leaf(data.alphas),
        "bias": _leaf(_swap(data.bias, n).unsqueeze(0)),
    }

    def forward() -> list[Tensor]:
        x = leaves["streams"]
        projected, mean_square = mhc.mhc_fused_projection(
            x.view(tokens, -1), leaves["weight"], use_split_k=True
        )
        pre, post, res = mhc.mhc_fused_scale(
            projected, leaves["alphas"], leaves["bias"], mean_square, n
        )
        res = mhc.mhc_fused_sinkhorn(res.reshape(tokens, 1, n, n), n, True, ITERATIONS)
        u = mhc.mhc_fused_aggregate(x, pre.reshape(tokens, 1, n), n)
        post = post.reshape(tokens, 1, n)
        streams = mhc.mhc_fused_expand_combine(leaves["branch"], None, post, x, res, n)
        return [streams, u]

    def restore(streams: Tensor) -> Tensor:
        return streams.reshape(tokens, channels, n).transpose(1, 2)

    def restore_weight(weight: Tensor) -> Tensor:
        return _swap(weight.unflatten(1, (channels, n)).transpose(1, 2).flatten(1), n)

    grad_streams = data.grad_streams.transpose(1, 2).contiguous().unsqueeze(1)
    return Implementation(
        _versioned("transformer-engine"),
        False,
        leaves,
        forward,
        [grad_streams, data.grad_u.unsqueeze(1)],
        {
            "streams": restore,
            "branch": lambda t: t.squeeze(1),
            "u": lambda t: t.reshape(tokens, channels),
            "weight": restore_weight,
        },
    )


def liger_pair(data: Operands) -> Implementation:
    """Liger: phi [n*C, M], ``h_res[o, i]``."""
    from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_post_res
    from liger_kernel.transformers.functional import liger_mhc_pre as liger_pre

    leaves = _leaves(data, boundary=False)
    leaves["weight"] = _leaf(data.weight.t().contiguous())

    def forward() -> list[Tensor]:
        x = leaves["streams"]
        pre, post, res = liger_mhc_coeffs(
            x, leaves["weight"], leaves["bias"], *_gates(leaves), tmax=ITERATIONS, rms_eps=RMS_EPS
        )
        return [liger_mhc_post_res(x, leaves["branch"], post, res), liger_pre(x, pre)]

    gradients = [data.grad_streams, data.grad_u]
    return Implementation(
        _versioned("liger-kernel"), False, leaves, forward, gradients, {"weight": Tensor.t}
    )


PEERS: dict[str, Callable[[Operands], Implementation]] = {
    "tile-kernels": tile_kernels_pair,
    "transformer-engine": transformer_engine_pair,
    "liger-kernel": liger_pair,
}


def _first(tensor: Tensor) -> Tensor:
    return tensor.squeeze(0)


def _swap(rows: Tensor, n: int) -> Tensor:
    """Packed rows with the two indices of the res part exchanged."""
    res = rows[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
    return torch.cat([rows[: 2 * n], res]).contiguous()


def _versioned(package: str) -> str:
    return f"{package}=={importlib.metadata.version(package)}"
