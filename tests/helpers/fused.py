"""Random operands of the fused operations, and one way to run reference and kernels on them.

All parameters are random: at their initial values most gradients are zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mhc_megatron.kernels import MappingOptions, Mappings, compositions, functional, rms_norm
from mhc_megatron.kernels.triton.arguments import INTERPRETED

_OPTIONS = MappingOptions(iterations=3, eps=1e-3, rms_eps=1e-2)
NORM_EPS = 1e-2
OPERATIONS = ("pre", "post", "post_pre", "single_pass")
STATES = ("streams", "u", "d_streams", "d_branch", "d_branch_bias", "d_norm_weight")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size; eps are large enough to matter."""

    operation: str = "post_pre"
    tokens: int = 5
    n: int = 4
    channels: int = 40
    dtype: torch.dtype = torch.float32
    options: MappingOptions = _OPTIONS
    branch_bias: bool = False
    norm: bool = False

    def with_projection(self, projection: str) -> "Case":
        return replace(self, options=replace(self.options, projection=projection))


def operands(case: Case, device: torch.device) -> dict[str, Tensor | None]:
    """Leaves by name: states in the case's dtype, parameters and mappings in float32."""
    tokens, n, channels = case.tokens, case.n, case.channels
    num_logits = case.options.num_logits(n)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape).to(dtype).to(device)

    leaves: dict[str, Tensor | None] = {"streams": randn(tokens, n, channels, dtype=case.dtype)}
    if case.operation != "pre":
        leaves["branch"] = randn(tokens, channels, dtype=case.dtype)
        leaves["branch_bias"] = randn(channels, dtype=case.dtype) if case.branch_bias else None
        leaves["mix_pre"] = torch.rand(tokens, n).to(device)
        leaves["mix_post"] = 2 * torch.rand(tokens, n).to(device)
        leaves["mix_res"] = torch.rand(tokens, n, n).softmax(-1).to(device)
    if case.operation != "post":
        leaves["weight"] = randn(num_logits, n * channels) * (n * channels) ** -0.5
        leaves["alpha_pre"], leaves["alpha_post"] = randn(1), randn(1)
        leaves["alpha_res"] = None if case.options.projection == "identity" else randn(1)
        leaves["bias"] = randn(num_logits)
        if case.norm:
            leaves["norm_weight"] = randn(channels, dtype=case.dtype)
    return leaves


def arguments(case: Case, leaves: dict[str, Tensor | None]) -> tuple[list, dict]:
    """Positional and keyword arguments of the case's operation."""
    positional: list = [leaves["streams"]]
    keywords: dict = {}
    if case.operation != "pre":
        mix = Mappings(leaves["mix_pre"], leaves["mix_post"], leaves["mix_res"])
        positional += [leaves["branch"], mix]
        keywords["branch_bias"] = leaves["branch_bias"]
    if case.operation != "post":
        gates = (leaves["alpha_pre"], leaves["alpha_post"], leaves["alpha_res"])
        positional += [leaves["weight"], gates, leaves["bias"]]
        keywords["options"] = case.options
        if case.norm:
            keywords |= {"norm_weight": leaves["norm_weight"], "norm_eps": NORM_EPS}
    return positional, keywords


def flatten(operation: str, outputs: object) -> dict[str, Tensor]:
    """Outputs by name."""
    if operation == "post":
        return {"streams": outputs}
    *states, mix = outputs
    named = dict(zip(("streams", "u")[-len(states) :], states, strict=True))
    return {**named, "pre": mix.pre, "post": mix.post, "res": mix.res}


def run_kernels(case: Case, leaves: dict[str, Tensor | None], **keywords: object) -> dict:
    positional, options = arguments(case, leaves)
    function = getattr(functional, case.operation)
    outputs = function(*positional, **options, backend="triton", **keywords)
    return flatten(case.operation, outputs)


def run_reference(
    case: Case, leaves: dict[str, Tensor | None], rounded: dict[str, Tensor] | None = None
) -> dict:
    """The composition; ``rounded`` are of ``rounded_states``.

    ``pre`` reads the stored streams and the norm the stored u, so the definition for float64
    replaces their numbers by the stored ones, and passes gradients through.
    """
    if rounded is None or case.operation == "post" or not (case.norm or "streams" in rounded):
        positional, options = arguments(case, leaves)
        function = getattr(compositions, case.operation)
        return flatten(case.operation, function(*positional, **options))
    streams = stored = leaves["streams"]
    if case.operation != "pre":
        post_leaves = arguments(replace(case, operation="post"), leaves)
        streams = compositions.post(*post_leaves[0], **post_leaves[1])
        stored = _with_numbers(streams, rounded["streams"])
    pre_case = replace(case, operation="pre", norm=False)
    positional, options = arguments(pre_case, {**leaves, "streams": stored})
    u, mix = compositions.pre(*positional, **options)
    if case.operation == "single_pass":
        u = (leaves["mix_pre"].unsqueeze(-1) * stored).sum(dim=-2)
    if case.norm:
        u = rms_norm(_with_numbers(u, rounded["u"]), leaves["norm_weight"], eps=NORM_EPS)
    return flatten(case.operation, (u, mix) if case.operation == "pre" else (streams, u, mix))


def rounded_states(case: Case, leaves: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """What the kernels store and read again: the new streams, and u before its norm."""
    if case.operation == "post":
        return {}
    with torch.no_grad():
        stored = run_kernels(replace(case, norm=False), leaves)
    return {name: stored[name] for name in ("streams", "u") if name in stored}


def _with_numbers(tensor: Tensor, numbers: Tensor) -> Tensor:
    """``numbers`` with the graph of ``tensor``."""
    return tensor + (numbers.to(tensor.dtype) - tensor).detach()


def with_gradients(
    run: Callable[[dict], dict[str, Tensor]],
    leaves: dict[str, Tensor | None],
    output_gradients: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs, and as ``d_<leaf>`` the gradients of all leaves; ``dtype`` casts them first."""
    leaves = {
        name: None if leaf is None else leaf.detach().to(dtype or leaf.dtype).requires_grad_()
        for name, leaf in leaves.items()
    }
    outputs = run(leaves)
    used = {name: out for name, out in outputs.items() if name in output_gradients}
    used = {name: out for name, out in used.items() if out.requires_grad}
    named = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(
        list(used.values()),
        list(named.values()),
        [output_gradients[name].to(out.dtype) for name, out in used.items()],
        allow_unused=True,
    )
    result = {name: out.detach() for name, out in outputs.items()}
    for (name, leaf), gradient in zip(named.items(), gradients, strict=True):
        result[f"d_{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return result


def tolerance(name: str, case: Case) -> float:
    """Of states one rounding to their dtype, of the rest what float32 sums leave."""
    if case.dtype == torch.float32:
        # A gate's gradient is one number, a sum in which much cancels.
        return 2e-4 if name.startswith("d_alpha") else 2e-5
    # The gradient of a normalised u is rounded once more, between two kernels.
    roundings = 2 if case.norm and name.startswith("d_") else 1
    if name in STATES:
        # The interpreter rounds float32 to bfloat16 towards zero, twice the error of a GPU.
        one = {torch.float16: 6e-4, torch.bfloat16: 6e-3 if INTERPRETED else 3e-3}[case.dtype]
        return roundings * one
    if case.norm and INTERPRETED and name in ("d_mix_post", "d_mix_res"):
        # Towards zero, the roundings in these sums have one sign.
        return 2e-3
    return 2e-3 if name.startswith("d_alpha") else 5e-4


def compare(case: Case, leaves: dict[str, Tensor | None], **keywords: object) -> dict[str, Tensor]:
    """The kernels' outputs and gradients, after comparing them with the reference in float64."""
    gradients = random_gradients(run_reference(case, leaves))
    got = with_gradients(lambda x: run_kernels(case, x, **keywords), leaves, gradients)
    rounded = rounded_states(case, leaves) if case.norm else got
    expected = with_gradients(
        lambda x: run_reference(case, x, rounded=rounded), leaves, gradients, torch.float64
    )
    assert got.keys() == expected.keys()
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    for name, size in _sizes_of_gates(case, leaves, expected).items():
        # Both are nothing where one stream is all there is to mix.
        errors[name] *= min(1.0, abs(float(expected[name])) / size) if size else 1.0
    for name, error in errors.items():
        assert got[name].isfinite().all(), name
        assert error <= tolerance(name, case), (name, error, errors)
        # A doubly stochastic matrix of one stream is the number 1; post does not read H_pre.
        if case.tokens and case.n > 1 and name != "d_mix_pre":
            assert expected[name].norm() > 0, f"{name} compares zeros"
    return got


def _sizes_of_gates(
    case: Case, leaves: dict[str, Tensor | None], expected: dict[str, Tensor]
) -> dict[str, float]:
    """Of the gates' gradients, if nothing but chance made their terms cancel.

    A gate's gradient times the gate is the product of its rows of phi with their gradient. Of two
    vectors of N numbers without relation that is the product of their lengths over the root of N;
    where it happens to be less, the rounding of the sum is not.
    """
    sizes = {}
    if "d_weight" in expected:
        n = case.n
        rows = {"pre": slice(0, n), "post": slice(n, 2 * n), "res": slice(2 * n, None)}
        for kind, some in rows.items():
            gate = leaves[f"alpha_{kind}"]
            if gate is not None:
                phi, gradient = leaves["weight"][some], expected["d_weight"][some]
                size = phi.norm() * gradient.norm() / gate.abs()
                sizes[f"d_alpha_{kind}"] = float(size) / phi.numel() ** 0.5
    return sizes


def random_gradients(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.randn(out.shape).to(out.device).to(out.dtype) for name, out in outputs.items()
    }


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``, in float64."""
    norm = expected.double().norm()
    error = (got.double() - expected.double()).norm()
    return float(error if norm == 0 else error / norm)
