"""Replayed passes: the bits and launches of Python's, and Python's ways where they do not fit."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from helpers.fused import Case
from helpers.repeated import Repeated, python_only, same
from helpers.stand_in_driver import Driver, stand_in_driver
from torch import Tensor

from mhc_megatron.kernels import backends, functional, native
from mhc_megatron.kernels.native import programs
from mhc_megatron.kernels.native.extension import BUILD, extension, missing
from mhc_megatron.kernels.triton import compiled
from mhc_megatron.kernels.triton.plan import planned
from mhc_megatron.kernels.triton.tape import NotTaken, Tape
from mhc_megatron.pipeline.weight_grads import WeightGrads

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None,
    reason="no C++ compiler, without which the extension is not built",
)

FORWARD = ["split_weight", "mix_fwd"]
BACKWARD = ["mix_bwd", "weight_bwd", "reduce_partials", "streams_bwd"]
SMALL = {"dtype": torch.bfloat16, "tokens": 3, "channels": 16}
CASES = [
    Case(operation="post_pre", norm=True, branch_bias=True, **SMALL),
    Case(operation="post_pre", norm=True, n=8, **SMALL),
    Case(operation="single_pass", branch_bias=True, **SMALL),
    Case(operation="pre", norm=True, n=2, **SMALL),
    Case(operation="pre", n=8, **SMALL),
    Case(operation="post", branch_bias=True, **SMALL),
    Case(operation="post", n=8, **SMALL),
    Case(operation="post_pre", **{**SMALL, "dtype": torch.float32}).with_projection("identity"),
    Case(operation="pre", n=3, **SMALL).with_projection("permutation"),
    # Of one token T is a constant of the kernels.
    Case(operation="post_pre", **{**SMALL, "tokens": 1}),
]
BOUNDARY = Case(operation="post_pre", **SMALL)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    with stand_in_driver(monkeypatch) as found:
        yield found


@pytest.mark.parametrize(
    ("case", "main_grad"),
    [(case, False) for case in CASES] + [(BOUNDARY, True), (Case(operation="pre", **SMALL), True)],
    ids=str,
)
def test_a_replayed_call_has_the_bits_and_the_launches_of_pythons(
    case: Case, main_grad: bool, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = Repeated(case, main_grad=main_grad)
    repeated.learn()
    driver.by_python.clear()
    driver.by_extension.clear()
    outputs = repeated.forward()
    gradients = repeated.gradients(outputs)
    assert "HyperConnection" in outputs[0].grad_fn.name()
    assert driver.by_python == []
    launched, streams = list(driver.by_extension), set(driver.streams)
    assert streams == {7}
    added = None if repeated.main_grad is None else repeated.main_grad.clone()

    python_only(monkeypatch)
    if repeated.main_grad is not None:
        repeated.main_grad.zero_()
    expected = repeated.forward()
    same(outputs, expected)
    same(gradients, repeated.gradients(expected))
    assert expected[0].grad_fn.name() == "FusedBackward"
    assert driver.by_python == launched
    same([added], [repeated.main_grad])
    assert added is None or added.abs().sum() > 0


@pytest.mark.parametrize(
    ("operation", "only"),
    [("post_pre", 0), ("post_pre", 1), ("post_pre", 2), ("single_pass", 0), ("pre", 2)],
)
def test_gradients_of_one_output_alone(
    operation: str, only: int, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = Repeated(Case(operation=operation, **SMALL))
    repeated.learn()
    repeated.gradients(repeated.forward(), only)
    driver.by_python.clear()
    outputs = repeated.forward()
    gradients = repeated.gradients(outputs, only)
    assert driver.by_python == []
    python_only(monkeypatch)
    same(gradients, repeated.gradients(repeated.forward(), only))


def test_parameters_without_gradients_are_left_out(driver: Driver) -> None:
    repeated = Repeated(BOUNDARY)
    for name in ("weight", "alpha_pre", "alpha_post", "alpha_res", "bias"):
        repeated.leaves[name].requires_grad_(False)
    trained = {name: leaf for name, leaf in repeated.leaves.items() if leaf.requires_grad}

    def backward() -> None:
        outputs = repeated.forward()
        torch.autograd.grad(outputs, list(trained.values()), [torch.ones_like(o) for o in outputs])

    for _ in range(2):
        backward()
    driver.by_python.clear()
    driver.by_extension.clear()
    backward()
    assert driver.by_python == []
    assert driver.by_extension == [*FORWARD, "mix_bwd", "streams_bwd"]


def test_other_shapes_and_leading_dimensions_have_programs_of_their_own(driver: Driver) -> None:
    repeated = Repeated(Case(operation="post_pre", **{**SMALL, "tokens": 6}))
    repeated.learn()
    flat = repeated.forward()
    leaves = repeated.leaves
    for name in ("streams", "branch"):
        shape = leaves[name].shape[1:]
        leaves[name] = leaves[name].detach().view(2, 3, *shape).requires_grad_()
    repeated.learn()
    driver.by_python.clear()
    folded = repeated.forward()
    assert driver.by_python == []
    assert folded[1].shape == (2, 3, repeated.case.channels)
    same([one.flatten(0, 1) for one in folded[:2]], flat[:2])


def test_strided_gradients_are_made_contiguous(driver: Driver) -> None:
    repeated = Repeated(BOUNDARY)
    repeated.learn()
    outputs = repeated.forward()
    grads = [torch.randn(output.shape).to(output.dtype) for output in outputs]
    strided = [torch.stack([grad, grad], dim=-1)[..., 0] for grad in grads]
    assert not strided[0].is_contiguous()
    leaves = list(repeated.leaves.values())
    driver.by_python.clear()
    expected = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    same(list(torch.autograd.grad(outputs, leaves, strided)), list(expected))
    assert driver.by_python == []


def test_memory_at_odd_addresses_is_pythons(driver: Driver) -> None:
    repeated = Repeated(BOUNDARY)
    repeated.learn()
    aligned = repeated.forward()
    branch = repeated.leaves["branch"].detach()
    shifted = torch.empty(branch.numel() + 1, dtype=branch.dtype)[1:].view(branch.shape)
    assert shifted.data_ptr() % 16
    repeated.leaves["branch"] = shifted.copy_(branch).requires_grad_()
    driver.by_extension.clear()
    outputs = repeated.forward()
    assert driver.by_extension == []
    same(outputs, aligned)
    # The gradients alone: they are not the operands'.
    repeated.leaves["branch"] = branch.requires_grad_()
    outputs = repeated.forward()
    grads = [torch.randn(output.shape).to(output.dtype) for output in outputs]
    odd = torch.empty(grads[1].numel() + 1, dtype=branch.dtype)[1:].view(grads[1].shape)
    odd.copy_(grads[1])
    leaves = list(repeated.leaves.values())
    expected = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    driver.by_extension.clear()
    found = torch.autograd.grad(outputs, leaves, [grads[0], odd, grads[2]])
    assert driver.by_extension == []
    same(list(found), list(expected))


def test_second_derivatives_are_refused(driver: Driver) -> None:
    repeated = Repeated(BOUNDARY)
    repeated.learn()
    outputs = repeated.forward()
    grads = [torch.ones_like(output).requires_grad_() for output in outputs]
    leaves = list(repeated.leaves.values())
    first = torch.autograd.grad(outputs, leaves, grads, create_graph=True)
    with pytest.raises(RuntimeError, match="first gradients only"):
        first[0].float().sum().backward()


def test_what_was_saved_must_not_change(driver: Driver) -> None:
    repeated = Repeated(BOUNDARY)
    repeated.learn()
    outputs = repeated.forward()
    with torch.no_grad():
        repeated.leaves["branch"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        repeated.gradients(outputs)


def test_a_graph_is_gone_after_its_backward(driver: Driver) -> None:
    repeated = Repeated(BOUNDARY)
    repeated.learn()
    outputs = repeated.forward()
    repeated.gradients(outputs)
    with pytest.raises(RuntimeError, match="a second time"):
        repeated.gradients(outputs)


def test_without_gradients_nothing_is_kept(driver: Driver) -> None:
    repeated = Repeated(BOUNDARY)
    repeated.learn()
    expected = repeated.forward()
    driver.by_python.clear()
    with torch.no_grad():
        outputs = repeated.forward()
    assert driver.by_python == [] and all(output.grad_fn is None for output in outputs)
    same(outputs, expected)


def test_the_gradient_of_post_passes_through_pre(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = Repeated(Case(operation="pre", **SMALL))
    streams = repeated.leaves["streams"]
    branch = torch.randn(repeated.case.tokens, repeated.case.channels).bfloat16().requires_grad_()

    def gradients() -> list[Tensor | None]:
        leaves = repeated.leaves
        gates = (leaves["alpha_pre"], leaves["alpha_post"], leaves["alpha_res"])
        u, mix = functional.pre(
            streams,
            leaves["weight"],
            gates,
            leaves["bias"],
            options=repeated.case.options,
            backend="triton",
        )
        out = functional.post(streams, branch + u, mix, backend="triton")
        of = [*leaves.values(), branch]
        grad = torch.ones_like(out)
        return list(torch.autograd.grad(out, of, grad))

    for _ in range(2):
        gradients()
    driver.by_python.clear()
    found = gradients()
    assert driver.by_python == []
    python_only(monkeypatch)
    same(found, gradients())


def test_a_profiler_sees_pythons_launches(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = Repeated(BOUNDARY)
    repeated.learn()
    monkeypatch.setattr(compiled, "is_observed", lambda: True)
    monkeypatch.setattr(
        compiled.Prepared, "_look_up", lambda launch, _: driver.by_python.append("observed")
    )
    driver.by_extension.clear()
    driver.by_python.clear()
    repeated.forward()
    assert driver.by_extension == [] and driver.by_python == ["observed"] * 2


def test_a_failed_launch_is_named(driver: Driver) -> None:
    repeated = Repeated(BOUNDARY)
    repeated.learn()
    driver.error = 719
    with pytest.raises(RuntimeError, match="split_weight: CUDA error 719"):
        repeated.forward()


def test_kernels_with_other_parameters_than_they_name_are_not_replayed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is said once, and not tried again."""
    programs._say_once.cache_clear()
    driver.scratch = 3
    repeated = Repeated(BOUNDARY)
    repeated.learn()
    monkeypatch.setattr(programs, "_taken", None)
    driver.by_python.clear()
    repeated.gradients(repeated.forward())
    assert driver.by_python == FORWARD + BACKWARD and driver.by_extension == []
    assert [record.message for record in caplog.records] == [
        "hyper-connections are launched by Python, not by the extension: "
        "a kernel has 6 parameters for 3 arguments"
    ]


def test_a_backward_that_cannot_be_replayed_is_pythons(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = Repeated(BOUNDARY)
    repeated.gradients(repeated.forward())
    outputs = repeated.forward()
    driver.scratch = 3
    expected = repeated.gradients(outputs)
    driver.scratch = 2
    monkeypatch.setattr(programs, "_taken", None)
    driver.by_python.clear()
    same(repeated.gradients(repeated.forward()), expected)
    assert driver.by_python == BACKWARD


def test_a_plan_that_was_forgotten_is_made_again_for_the_backward(driver: Driver) -> None:
    repeated = Repeated(BOUNDARY)
    repeated.learn()
    expected = repeated.gradients(repeated.forward())
    outputs = repeated.forward()
    forgotten = Repeated(BOUNDARY)
    forgotten.leaves = repeated.leaves
    planned.cache_clear()
    # Another output alone, of which there is no tape.
    repeated.gradients(outputs, 1)
    functional._boundary_plans._found.clear()
    forgotten.learn()
    driver.by_python.clear()
    same(forgotten.gradients(forgotten.forward()), expected)
    assert driver.by_python == []


def test_halves_of_a_backward_run_it_once(driver: Driver) -> None:
    """As the nodes of Python's functions: all of its gradients are computed together."""
    repeated = Repeated(BOUNDARY)
    repeated.learn()
    streams, *parameters = repeated.leaves.values()

    def output() -> Tensor:
        u = repeated.forward()[1]
        # A parameter of torch's own node, which does wait.
        return u.float() * gain

    gain = torch.randn(BOUNDARY.channels).requires_grad_()
    grads = torch.randn(BOUNDARY.tokens, BOUNDARY.channels)
    expected = torch.autograd.grad(output(), [streams, *parameters, gain], grads)
    out = output()
    halves = WeightGrads(torch.autograd.graph.get_gradient_edge(out), streams)
    driver.by_extension.clear()
    halves.backward(grads)
    assert gain.grad is None
    halves.finish()
    assert sorted(driver.by_extension) == sorted(BACKWARD)
    same([leaf.grad for leaf in (streams, *parameters, gain)], list(expected))


def test_a_tape_refuses_work_that_is_no_launch() -> None:
    tensor = torch.ones(4)
    with pytest.raises(NotTaken, match=r"aten\.add\.Tensor is no launch"), Tape([tensor]):
        tensor + tensor
    with Tape([tensor]) as tape:
        made = torch.empty(3, 5)
    assert tape.allocations == [([3, 5], torch.float32)]
    assert made.is_meta and tape.inputs[0].is_meta
    assert tape.place_of(tape.inputs[0]) == (0, [], [], 0)
    assert tape.place_of(made) == (1, [], [], 0)
    assert tape.place_of(made[1:]) == (1, [2, 5], [5, 1], 5)
    with pytest.raises(NotTaken, match="neither"):
        tape.place_of(torch.ones(2))


def test_it_says_what_it_is_or_why_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.availability() == (True, f"built for torch {torch.__version__.split('+')[0]}")
    monkeypatch.setattr(torch, "__version__", "1.2.3")
    extension.cache_clear()
    try:
        available, reason = native.availability()
    finally:
        monkeypatch.undo()
        extension.cache_clear()
    assert not available and reason.endswith("not 1.2.3")


def test_it_can_be_required(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = Repeated(BOUNDARY)
    repeated.backend = "native"
    repeated.learn()
    assert driver.by_extension
    monkeypatch.setattr("mhc_megatron.kernels.native.extension.availability", lambda: (False, "x"))
    reason = missing()
    assert reason == f"the launch extension x; {BUILD}"
    monkeypatch.setattr(backends, "NO_EXTENSION", reason)
    other = Repeated(Case(operation="post_pre", **{**SMALL, "tokens": 2}))
    other.backend = "native"
    with pytest.raises(ValueError, match="backend='native' cannot run: the launch extension x"):
        other.forward()
