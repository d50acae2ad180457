"""The kernels of expand and the contractions against the reference in float64.

On a GPU the same tests run compiled, at larger sizes as well.
"""

import re
from collections.abc import Callable

import pytest
import torch
from helpers.fused import relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mhc_megatron import kernels
from mhc_megatron.kernels import choose_backend, finite_inputs, head_operators, reference
from mhc_megatron.kernels.triton.arguments import INTERPRETED
from mhc_megatron.kernels.triton.head_tiles import HeadTiles
from mhc_megatron.kernels.triton.tiles import Tile

OPERATIONS = ("expand", "contract_mean", "contract_sum", "contract_learned")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Large enough to matter.
EPS = {"rms_eps": 1e-2, "eps": 1e-3}
ON_GPU = torch.cuda.is_available()
gpu_only = pytest.mark.skipif(not ON_GPU, reason="too large for the interpreter")


def operands(
    operation: str, tokens: int, n: int, channels: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Leaves by name; parameters are random, at their start the gradient of phi is all there is."""
    if operation == "expand":
        return {"hidden": torch.randn(tokens, channels).to(dtype).to(device)}
    leaves = {"streams": torch.randn(tokens, n, channels).to(dtype).to(device)}
    if operation == "contract_learned":
        width = n * channels
        leaves["weight"] = (torch.randn(n, width) * width**-0.5).to(device)
        leaves["scale"], leaves["bias"] = torch.randn(1).to(device), torch.randn(n).to(device)
    return leaves


def constants(operation: str, n: int) -> dict[str, object]:
    return {"expand": {"num_streams": n}, "contract_learned": EPS}.get(operation, {})


def run_kernels(operation: str, leaves: dict[str, Tensor], n: int, **keywords: object) -> Tensor:
    function = getattr(kernels, operation)
    return function(*leaves.values(), **constants(operation, n), backend="triton", **keywords)


def run_reference(operation: str, leaves: dict[str, Tensor], n: int) -> Tensor:
    return getattr(reference, operation)(*leaves.values(), **constants(operation, n))


def with_gradients(
    run: Callable[..., Tensor],
    operation: str,
    leaves: dict[str, Tensor],
    n: int,
    grad: Tensor,
    dtype: torch.dtype | None = None,
    **keywords: object,
) -> dict[str, Tensor]:
    """The output, and as ``d_<leaf>`` the gradients of all leaves; ``dtype`` casts them first."""
    leaves = {
        name: leaf.detach().to(dtype or leaf.dtype).requires_grad_()
        for name, leaf in leaves.items()
    }
    out = run(operation, leaves, n, **keywords)
    found = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    gradients = {f"d_{name}": value for name, value in zip(leaves, found, strict=True)}
    return {"out": out.detach(), **gradients}


def tolerance(name: str, dtype: torch.dtype) -> float:
    """Of states one rounding to their dtype, of the rest what float32 sums leave."""
    if name in ("out", "d_hidden", "d_streams"):
        # The interpreter rounds float32 to bfloat16 towards zero, twice the error of a GPU.
        bfloat16 = 6e-3 if INTERPRETED else 3e-3
        return {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: bfloat16}[dtype]
    # phi's two parts keep 16 bits. The scale's gradient is one number in which much cancels.
    exact = 2e-5 if dtype != torch.bfloat16 else 2e-4
    return 10 * exact if name == "d_scale" else exact


def compare(
    operation: str,
    device: torch.device,
    *,
    tokens: int = 5,
    n: int = 4,
    channels: int = 40,
    dtype: torch.dtype = torch.float32,
    tiles: HeadTiles | None = None,
) -> None:
    leaves = operands(operation, tokens, n, channels, dtype, device)
    grad = torch.randn_like(run_reference(operation, leaves, n))
    got = with_gradients(run_kernels, operation, leaves, n, grad, tiles=tiles)
    expected = with_gradients(run_reference, operation, leaves, n, grad, torch.float64)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        assert got[name].dtype == (leaves[name[2:]].dtype if name != "out" else dtype), name
        assert got[name].isfinite().all(), name
        assert relative_error(got[name], value) <= tolerance(name, dtype), name
        assert not tokens or value.norm() > 0, f"{name} compares zeros"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8], ids="n{}".format)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_number_of_streams_and_dtype(
    operation: str, n: int, dtype: torch.dtype, device: torch.device
) -> None:
    compare(operation, device, n=n, dtype=dtype, tokens=9, channels=24)


@pytest.mark.parametrize("tokens", [0, 1, 33], ids="T{}".format)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_number_of_tokens(operation: str, tokens: int, device: torch.device) -> None:
    compare(operation, device, tokens=tokens, channels=8)


@pytest.mark.parametrize("channels", [8, 64, 136], ids="C{}".format)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_channels_with_and_without_a_tail(
    operation: str, channels: int, device: torch.device
) -> None:
    compare(operation, device, channels=channels, dtype=torch.bfloat16)


def test_sums_over_several_programs(device: torch.device) -> None:
    """phi's, the bias' and the scale's gradients from three splits, the last one not whole."""
    tile = Tile(tokens=16, channels=32, num_stages=1)
    tiles = HeadTiles(
        copies=tile, learned=tile, weights_backward=tile, streams_backward=tile, split=16
    )
    for dtype in (torch.float32, torch.bfloat16):
        compare("contract_learned", device, tokens=37, dtype=dtype, tiles=tiles)


@pytest.mark.parametrize("n", [3, 4], ids="n{}".format)
@pytest.mark.parametrize("operation", OPERATIONS[:3])
def test_plain_sums_have_the_bits_of_the_reference(
    operation: str, n: int, device: torch.device
) -> None:
    """float32 sums of up to four streams in the order of the streams, divided once.

    The reference on a CPU: on a GPU torch multiplies by the rounded 1/n instead.
    """
    leaves = operands(operation, 7, n, 24, torch.float32, device)
    grad = torch.randn_like(run_reference(operation, leaves, n))
    got = with_gradients(run_kernels, operation, leaves, n, grad)
    leaves = {name: leaf.cpu() for name, leaf in leaves.items()}
    expected = with_gradients(run_reference, operation, leaves, n, grad.cpu())
    for name, value in expected.items():
        assert torch.equal(got[name].cpu(), value), name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_number_of_the_outputs_is_written(
    operation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: allocate(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    compare(operation, device, tokens=17, dtype=torch.bfloat16)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_same_bits_every_time(operation: str, device: torch.device) -> None:
    tokens, channels = (3001, 1288) if ON_GPU else (17, 40)
    leaves = operands(operation, tokens, 4, channels, torch.bfloat16, device)
    grad = torch.randn_like(run_reference(operation, leaves, 4))
    first = with_gradients(run_kernels, operation, leaves, 4, grad)
    for _ in range(20 if ON_GPU else 1):
        again = with_gradients(run_kernels, operation, leaves, 4, grad)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_wide_copy_of_the_streams_is_kept(operation: str, device: torch.device) -> None:
    """For backward: of the learned contraction the streams and float32 numbers per token."""
    leaves = operands(operation, 5, 4, 64, torch.bfloat16, device)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run_kernels(operation, leaves, 4)
    given = {leaf.data_ptr() for leaf in leaves.values()}
    made = [tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in given]
    assert made == ([(5, 5)] if operation == "contract_learned" else [])


def test_parameters_that_are_frozen_get_no_gradient(device: torch.device) -> None:
    leaves = operands("contract_learned", 5, 4, 40, torch.float32, device)
    grad = torch.randn(5, 40).to(device)
    expected = with_gradients(run_kernels, "contract_learned", leaves, 4, grad)
    leaves["streams"].requires_grad_()
    run_kernels("contract_learned", leaves, 4).backward(grad)
    assert torch.equal(leaves["streams"].grad, expected["d_streams"])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != "streams")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_leading_dimensions_and_strided_gradients(operation: str, device: torch.device) -> None:
    leaves = operands(operation, 6, 4, 16, torch.float32, device)
    shaped = {
        name: leaf.unflatten(0, (3, 2)) if leaf.shape[0] == 6 else leaf
        for name, leaf in leaves.items()
    }
    flat_grad = torch.randn_like(run_reference(operation, leaves, 4))
    expected = with_gradients(run_kernels, operation, leaves, 4, flat_grad)
    grad = flat_grad.unflatten(0, (3, 2)).transpose(0, 1).contiguous().transpose(0, 1)
    got = with_gradients(run_kernels, operation, shaped, 4, grad)
    for name, value in expected.items():
        assert torch.equal(got[name].reshape(value.shape), value), name


def test_expand_takes_memory_of_any_strides(device: torch.device) -> None:
    hidden = torch.randn(16, 6).to(device).t()
    got = kernels.expand(hidden, num_streams=2, backend="triton")
    assert torch.equal(got, reference.expand(hidden, num_streams=2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, *_: kernels.expand(x, num_streams=5, backend="triton"),
            "backend='triton' cannot run: num_streams=5 is not one of 1, 2, 3, 4, 8",
        ),
        (
            lambda x, *_: kernels.expand(x[..., :7], num_streams=2, backend="triton"),
            "backend='triton' cannot run: channels=7 is not a multiple of 8",
        ),
        (
            lambda x, *_: kernels.contract_sum(x.transpose(0, 1), backend="triton"),
            "backend='triton' cannot run: streams are not contiguous",
        ),
        (
            lambda x, *_: kernels.contract_mean(x.double(), backend="triton"),
            "backend='triton' cannot run: streams are torch.float64",
        ),
        (lambda x, *_: kernels.contract_mean(x, backend="cuda"), "backend='cuda' is not one of"),
        (lambda x, *_: kernels.expand(x, num_streams=0), "num_streams=0 must be at least 1"),
        (
            lambda x, *_: kernels.expand(x.long(), num_streams=2),
            "hidden: expected floating [..., C], got torch.int64 (3, 2, 8)",
        ),
        (
            lambda x, *_: kernels.contract_sum(x.long()),
            "streams: expected floating [..., n, C], got torch.int64 (3, 2, 8)",
        ),
        (
            lambda x, w, s, b: kernels.contract_learned(x, w[:, 1:], s, b, **EPS),
            "weight: expected shape (2, 16), got (2, 15)",
        ),
        (
            lambda x, w, s, b: kernels.contract_learned(x, w, b, b, **EPS),
            "scale: expected shape (1,), got (2,)",
        ),
        (
            lambda x, w, s, b: kernels.contract_learned(x, w, s, s, **EPS),
            "bias: expected shape (2,), got (1,)",
        ),
        (
            lambda x, w, s, b: kernels.contract_learned(
                x, w.bfloat16(), s, b, **EPS, backend="triton"
            ),
            "weight: expected torch.float32, got torch.bfloat16",
        ),
    ],
)
def test_a_wrong_argument_is_named(
    call: Callable[..., Tensor], message: str, device: torch.device
) -> None:
    leaves = operands("contract_learned", 3, 2, 8, torch.float32, device)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*leaves.values())


def test_auto_takes_the_reference_without_a_gpu() -> None:
    hidden = torch.randn(3, 8)
    assert choose_backend(hidden.unsqueeze(-2), num_streams=5).reason.startswith("num_streams=5")
    assert choose_backend(hidden.unsqueeze(-2), num_streams=4).name == "reference"
    assert kernels.expand(hidden, num_streams=5).shape == (3, 5, 8)


@pytest.mark.parametrize("name", ["hidden", "streams", "weight", "scale", "bias"])
def test_a_number_that_is_not_finite_is_named_when_checking(
    name: str, device: torch.device
) -> None:
    operation = "expand" if name == "hidden" else "contract_learned"
    leaves = operands(operation, 3, 2, 8, torch.float32, device)
    leaves[name].view(-1)[-1] = float("nan")
    message = f"{name}: expected finite numbers, 1 of {leaves[name].numel()} are not"
    with finite_inputs(), pytest.raises(ValueError, match=re.escape(message)):
        run_kernels(operation, leaves, 2)
    # Otherwise nothing is looked at: each look would wait for the GPU.
    assert run_kernels(operation, leaves, 2).isnan().any()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiled_equals_eager_to_the_bit(operation: str, device: torch.device) -> None:
    leaves = operands(operation, 5, 4, 16, torch.bfloat16, device)
    grad = torch.randn_like(run_reference(operation, leaves, 4))
    eager = with_gradients(run_kernels, operation, leaves, 4, grad)
    calls: set[str] = set()

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        calls.update(str(node.target) for node in module.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    compiled = torch.compile(run_kernels, backend=backend, fullgraph=True)
    traced = with_gradients(compiled, operation, leaves, 4, grad)
    assert any(call.startswith("mhc_megatron.") for call in calls), calls
    for name, value in eager.items():
        assert torch.equal(traced[name], value), name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fake_tensors_have_the_shapes_of_real_ones(operation: str, device: torch.device) -> None:
    leaves = operands(operation, 5, 4, 16, torch.bfloat16, device)
    real = run_kernels(operation, leaves, 4)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {name: mode.from_tensor(leaf) for name, leaf in leaves.items()}
        faked = run_kernels(operation, fakes, 4)
    assert (faked.shape, faked.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("operation", ["expand", "contract", "contract_learned"])
def test_operators_keep_the_rules_of_torch_library(operation: str, device: torch.device) -> None:
    of = "contract_sum" if operation == "contract" else operation
    leaves = operands(of, 5, 4, 16, torch.bfloat16, device)
    given = [leaf.requires_grad_() for leaf in leaves.values()]
    extra = {"expand": (4, 1), "contract": (4,), "contract_learned": tuple(EPS.values())}
    torch.library.opcheck(getattr(head_operators, operation), (*given, *extra[operation]))


@gpu_only
@pytest.mark.parametrize("size", [(4096, 4, 2560), (1000, 4, 1288), (63, 3, 7168), (300, 8, 2560)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_model_sizes(operation: str, size: tuple[int, int, int], device: torch.device) -> None:
    tokens, n, channels = size
    for dtype in (torch.bfloat16, torch.float32) if tokens <= 1000 else (torch.bfloat16,):
        compare(operation, device, tokens=tokens, n=n, channels=channels, dtype=dtype)


@gpu_only
@pytest.mark.parametrize("operation", OPERATIONS)
def test_more_than_2_to_the_31_elements(operation: str, device: torch.device) -> None:
    """The last tokens of a large state equal the same tokens alone, and so do their gradients."""
    tokens, tail = 2**31 // (4 * 2560) + 64, 64
    small = operands(operation, tail, 4, 2560, torch.bfloat16, device)
    first = next(iter(small))
    large = dict(small)
    large[first] = torch.zeros(tokens, *small[first].shape[1:], dtype=torch.bfloat16, device=device)
    large[first][-tail:] = small[first]
    small[first].requires_grad_()
    large[first].requires_grad_()
    results = []
    for leaves in (small, large):
        out = run_kernels(operation, leaves, 4)
        (grad,) = torch.autograd.grad(
            out.narrow(0, len(out) - tail, tail).square().sum(), leaves[first]
        )
        results.append((out[-tail:], grad[-tail:]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
