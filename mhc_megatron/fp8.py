"""What FP8 needs before a hyper-connected layer is built: Megatron's fields, checked. Pure.

FP8 begins at the branches' matrix products, inside Transformer Engine's modules. The streams, the
coefficients and the hyper-connections' parameters never enter one, so there is nothing to convert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from mhc_megatron.errors import UserError

OLDEST_TRANSFORMER_ENGINE = Version("2.8")
_WIDTH = 16
_MXFP8_WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What decides which recipes run.

    Attributes:
        transformer_engine: its version; None if it is not installed.
        capability: compute capability of the GPU; None without one.
        cuda: the version torch was built for; None for a build without CUDA.
    """

    transformer_engine: Version | None
    capability: tuple[int, int] | None
    cuda: Version | None


@dataclass(frozen=True, kw_only=True)
class _Needs:
    capability: tuple[int, int]
    below: tuple[int, int] = (99, 0)
    cuda: Version


# As transformer_engine.pytorch.quantization says (2.20), where it can be known without a GPU.
_RECIPES = {
    "delayed": _Needs(capability=(8, 9), cuda=Version("12.1")),
    "tensorwise": _Needs(capability=(8, 9), cuda=Version("12.1")),
    "blockwise": _Needs(capability=(9, 0), cuda=Version("12.9")),
    "mxfp8": _Needs(capability=(10, 0), below=(12, 0), cuda=Version("12.8")),
}


def reject_unsupported_precision(config: Any, platform: Platform) -> None:
    """Raise a UserError for the first FP8 or FP4 option that cannot work.

    Args:
        config: Megatron's configuration, or a run's; ``fp8``, ``fp8_recipe``, ``fp8_param`` and
            ``fp4`` are read, and left as they are.
        platform: where the model will run.
    """
    if getattr(config, "fp4", None):
        raise UserError(
            f"fp4={config.fp4!r} does not combine with hyper-connections: nobody has compared its "
            "gradients with bf16 there; use fp8, or leave it out"
        )
    if not config.fp8:
        return
    option, engine = f"fp8={config.fp8!r}", platform.transformer_engine
    if engine is None:
        raise UserError(
            f"{option} needs Transformer Engine, which is not installed; install "
            f"transformer-engine[pytorch]>={OLDEST_TRANSFORMER_ENGINE}, or leave fp8 out"
        )
    if engine < OLDEST_TRANSFORMER_ENGINE:
        raise UserError(
            f"{option} with Transformer Engine {engine} is not supported; install "
            f"transformer-engine[pytorch]>={OLDEST_TRANSFORMER_ENGINE}"
        )
    if getattr(config, "fp8_param", False):
        raise UserError(
            "fp8_param=True (--fp8-param-gather) does not combine with hyper-connections: the "
            "distributed optimizer would hold FP8 weights beside their float32 parameters, which "
            "nobody has compared with bf16; set it to False"
        )
    recipe = _recipe_of(config)
    if recipe not in _RECIPES:
        raise UserError(
            f"fp8_recipe={recipe!r} is not one of {', '.join(_RECIPES)}, whose needs are known; "
            "use one of these"
        )
    _reject_recipe(recipe, platform)


def _reject_recipe(recipe: str, platform: Platform) -> None:
    needs, found, cuda = _RECIPES[recipe], platform.capability, platform.cuda
    if found is None or cuda is None:
        raise UserError(
            f"fp8_recipe={recipe!r} needs a GPU, and torch sees none; leave fp8 out on a CPU"
        )
    if not needs.capability <= found < needs.below or cuda < needs.cuda:
        usable = [
            name
            for name, other in _RECIPES.items()
            if other.capability <= found < other.below and cuda >= other.cuda
        ]
        least = ".".join(map(str, needs.capability))
        bound = "" if needs.below[0] == 99 else f", below {'.'.join(map(str, needs.below))},"
        remedy = f"use fp8_recipe={' or '.join(map(repr, usable))}" if usable else "leave fp8 out"
        raise UserError(
            f"fp8_recipe={recipe!r} needs compute capability {least}{bound} and CUDA {needs.cuda}; "
            f"this GPU has {'.'.join(map(str, found))}, and torch CUDA {cuda}; {remedy}"
        )


def reject_weights(config: Any, weights: Mapping[str, Sequence[int]]) -> None:
    """Raise a UserError if FP8 is asked for and a layer has not the weights for it.

    Args:
        config: Megatron's.
        weights: of a layer, name and shape [..., out, in] on this rank, from ``engine_weights``.
            megatron-core's local linear layers, which are none of them, ignore FP8 in silence.
    """
    if not config.fp8:
        return
    if not weights:
        raise UserError(
            f"fp8={config.fp8!r} would be ignored by megatron-core's local modules; use a layer "
            "spec of Transformer Engine (use_transformer_engine=True, "
            "transformer_impl='transformer_engine'), or leave fp8 out"
        )
    multiple = _MXFP8_WIDTH if _recipe_of(config) == "mxfp8" else _WIDTH
    for name, shape in weights.items():
        for width in shape[-2:]:
            if width % multiple:
                raise UserError(
                    f"{name} is {' x '.join(map(str, shape))} on this rank, and {width} is not "
                    f"divisible by {multiple}, which fp8={config.fp8!r} needs; change hidden_size, "
                    "ffn_hidden_size or the heads, or tensor parallelism"
                )


def reject_unreadable_scales(config: Any, *, refuses: bool, allowed: bool) -> None:
    """Raise a UserError if a checkpoint would be written that cannot be loaded again.

    Args:
        config: Megatron's, or a run's.
        refuses: Transformer Engine does not load pickled scales unless it is told to.
        allowed: it is told to.
    """
    if config.fp8 and _recipe_of(config) == "delayed" and refuses and not allowed:
        raise UserError(
            "fp8_recipe='delayed': this Transformer Engine saves its scales as a Python pickle, "
            "and refuses to load them; export NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1 if you trust "
            "the checkpoints of this run, or use fp8_recipe='tensorwise' or 'blockwise', which "
            "have no scales to save"
        )


def _recipe_of(config: Any) -> str:
    """``fp8_recipe`` as text; megatron-core takes a text or its own enumeration."""
    return str(getattr(config.fp8_recipe, "value", config.fp8_recipe))
