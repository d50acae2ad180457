"""torch.compile, torch.export and FakeTensor trace through the kernels without a graph break."""

from collections.abc import Callable

import pytest
import torch
from helpers.fused import NORM_EPS, OPERATIONS, Case, operands, run_kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mhc_megatron.kernels import MappingOptions, Mappings, functional, operators
from mhc_megatron.kernels.packed import pack
from mhc_megatron.kernels.triton.tiles import default_tiles

CASES = [
    *(Case(operation=operation) for operation in OPERATIONS),
    Case(operation="post_pre", dtype=torch.bfloat16),
    Case(operation="post_pre").with_projection("identity"),
    Case(operation="pre", dtype=torch.bfloat16, norm=True),
    Case(operation="post_pre", norm=True),
]


def leaves_of(case: Case, device: torch.device) -> dict[str, Tensor | None]:
    return {
        name: leaf if leaf is None else leaf.requires_grad_()
        for name, leaf in operands(case, device).items()
    }


def gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor | None]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (out.float() * torch.randn(out.shape, generator=generator).to(out.device)).sum()
        for out in outputs.values()
    )
    given = [leaf for leaf in leaves.values() if leaf is not None]
    return list(torch.autograd.grad(loss, given, allow_unused=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_equals_eager_to_the_bit(case: Case, device: torch.device) -> None:
    leaves = leaves_of(case, device)
    eager = run_kernels(case, leaves)
    calls: set[str] = set()

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        calls.update(str(node.target) for node in module.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    compiled = torch.compile(run_kernels, backend=backend, fullgraph=True)(case, leaves)
    assert any(call.startswith("mhc_megatron.") for call in calls), calls
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        assert torch.equal(compiled[name], value), name
    expected, got = gradients(eager, leaves), gradients(compiled, leaves)
    assert any(grad is not None and grad.norm() > 0 for grad in expected)
    for left, right in zip(expected, got, strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)


@pytest.mark.parametrize(
    ("operation", "norm"),
    [*((operation, False) for operation in OPERATIONS), ("pre", True), ("post_pre", True)],
)
def test_fake_tensors_have_the_shapes_of_real_ones(
    operation: str, norm: bool, device: torch.device
) -> None:
    case = Case(operation=operation, norm=norm, dtype=torch.bfloat16)
    real = run_kernels(case, operands(case, device))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {
            name: None if leaf is None else mode.from_tensor(leaf)
            for name, leaf in operands(case, device).items()
        }
        faked = run_kernels(case, fakes)
    for name, value in real.items():
        assert (faked[name].shape, faked[name].dtype) == (value.shape, value.dtype), name


class Sublayer(torch.nn.Module):
    """pre, a branch and post."""

    def __init__(self, leaves: dict[str, Tensor], options: MappingOptions) -> None:
        super().__init__()
        self.weight, self.bias = leaves["weight"], leaves["bias"]
        self.gates = (leaves["alpha_pre"], leaves["alpha_post"], leaves["alpha_res"])
        self.options = options

    def forward(self, streams: Tensor) -> Tensor:
        u, mix = functional.pre(
            streams, self.weight, self.gates, self.bias, options=self.options, backend="triton"
        )
        return functional.post(streams, torch.tanh(u), mix, backend="triton")


def test_exported_equals_eager_to_the_bit(device: torch.device) -> None:
    case = Case(operation="pre")
    leaves = operands(case, device)
    streams = leaves["streams"]
    sublayer = Sublayer(leaves, case.options)
    exported = torch.export.export(sublayer, (streams,))
    calls = [str(node.target) for node in exported.graph.nodes]
    assert [call for call in calls if call.startswith("mhc_megatron.")] == [
        "mhc_megatron.pre.default",
        "mhc_megatron.post.default",
    ]
    assert torch.equal(exported.module()(streams), sublayer(streams))


def test_tiles_of_the_caller_are_refused_while_tracing(device: torch.device) -> None:
    case = Case(operation="pre")
    tiles = default_tiles(case.n, case.tokens, case.channels, case.dtype)
    with FakeTensorMode() as mode:
        leaves = operands(case, device)
        fakes = {name: mode.from_tensor(leaf) for name, leaf in leaves.items()}
        with pytest.raises(ValueError, match="tiles: expected None while tracing"):
            run_kernels(case, fakes, tiles=tiles)


# phi has parts of its own only with bfloat16 streams, of eight in another order.
@pytest.mark.parametrize(
    ("operation", "dtype", "norm", "n"),
    [
        ("pre", torch.bfloat16, False, 4),
        ("pre", torch.bfloat16, True, 4),
        ("pre", torch.bfloat16, False, 8),
        ("post", torch.bfloat16, False, 4),
        ("post_pre", torch.bfloat16, True, 4),
        ("post_pre", torch.bfloat16, False, 8),
        ("post_pre", torch.float32, False, 4),
    ],
)
def test_operators_keep_the_rules_of_torch_library(
    operation: str, dtype: torch.dtype, norm: bool, n: int, device: torch.device
) -> None:
    leaves = leaves_of(Case(operation="post_pre", dtype=dtype, norm=norm, n=n), device)
    mix = (leaves["mix_pre"], leaves["mix_post"], leaves["mix_res"])
    packed = pack(Mappings(*(tensor.detach() for tensor in mix))).requires_grad_()
    post = (leaves["branch"], None, packed)
    names = ("weight", "alpha_pre", "alpha_post", "alpha_res", "bias")
    constants = operators.constants_of(Case().options)
    pre = (*(leaves[name] for name in names), leaves.get("norm_weight"), *constants, NORM_EPS)
    arguments = {"pre": pre, "post": post, "post_pre": (*post, *pre, False)}[operation]
    torch.library.opcheck(getattr(operators, operation), (leaves["streams"], *arguments))
