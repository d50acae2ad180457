"""What the tests change of Triton's interpreter: how often, and not what, it prepares."""

import pytest
import torch
import triton.language as tl
from helpers.fused import Case, operands, run_kernels
from helpers.interpreter import interpret_faster
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled where there is a GPU"
)


def test_the_language_is_prepared_once_per_kernel_and_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared = []
    prepare = interpreter._patch_lang_core
    monkeypatch.setattr(
        interpreter, "_patch_lang_core", lambda *args: (prepared.append(args), prepare(*args))
    )
    case = Case(operation="post", tokens=3, channels=8)
    leaves = operands(case, torch.device("cpu"))
    # Triton puts back what a class has inherited as its own, the first time.
    run_kernels(case, leaves)
    language = dict(vars(tl)), dict(vars(tl.core)), dict(vars(tl.tensor))
    prepared.clear()
    launched = run_kernels(case, leaves)
    # Of triton.language and of its core.
    assert len(prepared) == 2
    assert (dict(vars(tl)), dict(vars(tl.core)), dict(vars(tl.tensor))) == language
    assert launched["streams"].isfinite().all()


def test_to_ask_again_changes_nothing() -> None:
    prepare = interpreter._patch_lang
    interpret_faster()
    assert interpreter._patch_lang is prepare
