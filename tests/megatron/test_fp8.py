"""FP8 that cannot work is refused at construction; the checks are functions of plain values."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.fp8 import (
    Platform,
    reject_unreadable_scales,
    reject_unsupported_precision,
    reject_weights,
)
from mhc_megatron.megatron.engine import engine_weights, refuses_pickled_scales, this_platform
from mhc_megatron.megatron.layer import MHCTransformerLayer

HOPPER = Platform(transformer_engine=Version("2.20.2"), capability=(9, 0), cuda=Version("13.0"))


def config(**options: Any) -> SimpleNamespace:
    """The fields that are read, as Megatron's configuration has them."""
    return SimpleNamespace(
        **{"fp4": None, "fp8": "hybrid", "fp8_recipe": "delayed", "fp8_param": False, **options}
    )


def platform(**options: Any) -> Platform:
    values = {"transformer_engine": Version("2.20"), "capability": (9, 0), "cuda": Version("13.0")}
    return Platform(**{**values, **options})


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", Fp8Recipe.delayed])
def test_hopper_runs_three_recipes(recipe: str) -> None:
    reject_unsupported_precision(config(fp8_recipe=recipe), HOPPER)


def test_without_fp8_nothing_is_asked_of_the_machine() -> None:
    nothing = Platform(transformer_engine=None, capability=None, cuda=None)
    reject_unsupported_precision(config(fp8=None), nothing)
    reject_weights(config(fp8=None), {})
    reject_weights(config(fp8=None), {"weight": (3, 5)})


@pytest.mark.parametrize(
    ("options", "where", "message"),
    [
        ({}, {"transformer_engine": None}, r"fp8='hybrid' needs .* install .*\[pytorch\]>=2.8"),
        ({}, {"transformer_engine": Version("2.3.1")}, "Engine 2.3.1 is not supported; install"),
        ({"fp8_param": True}, {}, r"fp8_param=True \(--fp8-param-gather\) .* set it to False"),
        ({"fp8_recipe": "custom"}, {}, "fp8_recipe='custom' is not one of delayed, tensorwise"),
        ({"fp8": None, "fp4": "e2m1"}, {}, "fp4='e2m1' does not combine .* use fp8"),
        ({}, {"capability": None}, "fp8_recipe='delayed' needs a GPU, and torch sees none"),
        ({}, {"cuda": None}, "needs a GPU, and torch sees none; leave fp8 out on a CPU"),
        (
            {"fp8_recipe": "mxfp8"},
            {},
            r"'mxfp8' needs compute capability 10.0, below 12.0, and CUDA 12.8; this GPU has 9.0, "
            r"and torch CUDA 13.0; use fp8_recipe='delayed' or 'tensorwise' or 'blockwise'",
        ),
        (
            {"fp8_recipe": Fp8Recipe.blockwise},
            {"cuda": Version("12.8")},
            "'blockwise' needs compute capability 9.0 and CUDA 12.9; .*='delayed' or 'tensorwise'$",
        ),
        ({"fp8_recipe": "mxfp8"}, {"capability": (12, 0)}, "this GPU has 12.0"),
        ({}, {"capability": (8, 0)}, "needs compute capability 8.9 .* 8.0, .*; leave fp8 out"),
    ],
)
def test_what_cannot_work_is_named(
    options: dict[str, Any], where: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        reject_unsupported_precision(config(**options), platform(**where))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "weights", "message"),
    [
        ("delayed", {}, "fp8='hybrid' would be ignored by megatron-core's local modules; use"),
        ("delayed", {"a": (32, 48), "b.weight": (24, 64)}, r"b.weight is 24 x 64 .*, and 24 is"),
        ("blockwise", {"weight": (4, 16, 40)}, "weight is 4 x 16 x 40 .* 40 is not divisible by 1"),
        ("mxfp8", {"weight": (64, 48)}, "48 is not divisible by 32, which fp8='hybrid' needs"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    recipe: str, weights: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        reject_weights(config(fp8_recipe=recipe), weights)


def test_scales_that_cannot_be_loaded_again_are_refused_before_training() -> None:
    with pytest.raises(UserError, match="NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1"):
        reject_unreadable_scales(config(), refuses=True, allowed=False)
    for options, refuses, allowed in (
        ({}, True, True),
        ({}, False, False),
        ({"fp8_recipe": "blockwise"}, True, False),
        ({"fp8": None}, True, False),
    ):
        reject_unreadable_scales(config(**options), refuses=refuses, allowed=allowed)


def test_an_engine_that_refuses_pickles_is_known_by_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not refuses_pickled_scales()  # there is none
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    assert not refuses_pickled_scales()
    (package / "_extra_state.py").touch()
    importlib.invalidate_caches()
    assert refuses_pickled_scales()
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_weights_that_fit() -> None:
    reject_weights(config(), {"weight": (48, 16), "grouped": (3, 32, 16)})


class Linear(torch.nn.Linear):
    """Stands for a module of Transformer Engine, which is known by where its class is defined."""


Linear.__module__ = "transformer_engine.pytorch.module.linear"


class OfMegatron(Linear):
    pass


def test_only_the_matrices_of_the_engine_are_looked_at() -> None:
    layer = torch.nn.ModuleDict({"te": OfMegatron(3, 5), "local": torch.nn.Linear(7, 9)})
    assert engine_weights(layer) == {"te.weight": (5, 3)}
    assert engine_weights(Linear(3, 5)) == {"weight": (5, 3)}


def test_the_platform_is_that_of_this_process() -> None:
    found = this_platform()
    assert (found.capability is not None) == torch.cuda.is_available()
    assert (found.cuda is not None) == (torch.version.cuda is not None)


def test_a_layer_checks_before_it_is_built() -> None:
    megatron_config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, hidden_dropout=0.0
    )
    megatron_config.fp4 = "e2m1"
    with pytest.raises(UserError, match="fp4='e2m1' does not combine"):
        MHCTransformerLayer(megatron_config, get_gpt_layer_local_spec().submodules, mhc=MHCConfig())
