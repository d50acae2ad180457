"""The hyper-connections' entries of a state dict under the names and orientation of three projects.

Pure functions from state dict to state dict. All three pack phi and the bias as pre | post | res
and see the res part, rows 2n to 2n + n^2, as a row-major matrix. Ours is indexed [new stream, old
stream], DeepSeek-V4's and Megatron-LM's [old, new] (docs/math.md, Conventions), so that between
ours and theirs its two indices are swapped.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mhc_megatron.errors import UserError

Names = Literal["ours", "megatron", "deepseek_v4"]
State = Mapping[str, Any]

_GATES = ("alpha_pre", "alpha_post", "alpha_res")
_SITE = re.compile(r"decoder\.layers\.(\d+)\.(self_attention|mlp)_hyper_connection\.(.+)")
_V4_SITE = re.compile(r"layers\.(\d+)\.hc_(attn|ffn)_(fn|base|scale)")
_TO_V4 = {"self_attention": "attn", "mlp": "ffn"}
_FROM_V4 = {short: name for name, short in _TO_V4.items()}
# phi, bias and scale of the learned contraction.
_HEADS: dict[Names, tuple[str, str, str]] = {
    "ours": tuple(f"decoder.final_layernorm.contraction.{x}" for x in ("weight", "bias", "scale")),  # type: ignore[dict-item]
    "megatron": ("decoder.hc_head_fn", "decoder.hc_head_base", "decoder.hc_head_scale"),
    "deepseek_v4": ("hc_head_fn", "hc_head_base", "hc_head_scale"),
}
_OUR_NORM, _THEIR_NORM = "decoder.final_layernorm.norm.", "decoder.final_layernorm."
_NAMED = 3


@dataclass(frozen=True)
class _Parts:
    """A state dict taken apart, in our orientation.

    Attributes:
        sites: phi [M, n*C], bias [M] and gates [3] by (layer, branch).
        head: phi [n, n*C], bias [n] and scale [1] of the learned contraction, if there is one.
        others: all that belongs to no hyper-connection.
    """

    sites: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    head: tuple[Tensor, Tensor, Tensor] | None = None
    others: dict[str, Any] = field(default_factory=dict)


def convert_names(
    state: State, source: Names, target: Names, *, only_hyper_connections: bool = False
) -> dict[str, Any]:
    """``state`` under other names, with ``H_res`` in the other orientation where they differ.

    Args:
        state: a whole or partial model's; n is taken from the shapes. Parameters keep their dtype.
        source, target: ``ours`` and ``megatron`` name the branches alike; of ``deepseek_v4`` only
            the hyper-connections are known here.
        only_hyper_connections: leave all other entries out.

    Returns:
        A new state dict. Tensors that do not change are shared with ``state``.

    Raises:
        UserError: a hyper-connection lacks an entry or has one too many; ``H_res`` is not made from
            n^2 logits; entries have no name in the target. Each is named.
    """
    for role, names in (("source", source), ("target", target)):
        if names not in get_args(Names):
            raise UserError(f"{role} {names!r} is not one of {', '.join(get_args(Names))}")
    parts = _read_v4(state) if source == "deepseek_v4" else _read(state, source)
    if not parts.sites:
        raise UserError(
            f"no entry has a name of a hyper-connection of {source!r}; check the source"
        )
    if only_hyper_connections:
        parts = _Parts(parts.sites, parts.head, {})
    if parts.others and "deepseek_v4" in (source, target):
        raise UserError(
            f"{_few(parts.others)}: only hyper-connections have known names in both {source!r} and "
            f"{target!r}; ask for them alone (--only-hyper-connections)"
        )
    return _write_v4(parts) if target == "deepseek_v4" else _write(parts, target)


def is_hyper_connection(name: str, names: Names) -> bool:
    """Whether an entry belongs to a hyper-connection or to the learned contraction."""
    pattern = _V4_SITE if names == "deepseek_v4" else _SITE
    return pattern.fullmatch(name) is not None or name in _HEADS[names]


def model_name(stored: str, names: Names) -> str:
    """The name in a model of an entry of its distributed checkpoint: the final norm's differs."""
    if names == "ours" and stored in (f"{_THEIR_NORM}weight", f"{_THEIR_NORM}bias"):
        return _OUR_NORM + stored.removeprefix(_THEIR_NORM)
    return stored


def swap_streams(packed: Tensor) -> Tensor:
    """Swap the two indices of the res part along the first dimension: ours to theirs, and back.

    Args:
        packed: phi [M, n*C] or bias [M] with M = 2n + n^2.

    Returns:
        The same shape and dtype.
    """
    n = _num_streams(packed)
    res = packed[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
    return torch.cat([packed[: 2 * n], res])


def _num_streams(packed: Tensor) -> int:
    n = isqrt(len(packed) + 1) - 1
    if n < 1 or n * n + 2 * n != len(packed):
        raise UserError(
            f"{len(packed)} logits per token are not 2n + n^2 of any n; only H_res of n^2 logits "
            "(mhc.projection sinkhorn, sinkhorn_v4 or unconstrained) has a counterpart"
        )
    return n


def _few(names: Mapping[str, Any] | list[str]) -> str:
    named = sorted(names)
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return ", ".join(named[:_NAMED]) + more


def _whole(found: dict[str, Tensor], wanted: tuple[str, ...], where: str) -> list[Tensor]:
    """The wanted entries in order; others, and missing ones, are an error."""
    unknown = [where.format(name) for name in found if name not in wanted]
    missing = [where.format(name) for name in wanted if name not in found]
    if unknown or missing:
        texts = [f"unknown: {_few(unknown)}"] * bool(unknown)
        texts += [f"missing: {_few(missing)}"] * bool(missing)
        raise UserError(f"a hyper-connection is not as expected; {'; '.join(texts)}")
    return [found[name] for name in wanted]


def _taken_apart(
    state: State, pattern: re.Pattern[str], head: tuple[str, str, str]
) -> tuple[dict[tuple[int, str], dict[str, Tensor]], _Parts]:
    sites: dict[tuple[int, str], dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in state.items():
        if found := pattern.fullmatch(name):
            sites.setdefault((int(found[1]), found[2]), {})[found[3]] = value
        elif name in head:
            heads[name] = value
        else:
            others[name] = value
    whole = _whole(heads, head, "{}") if heads else None
    return sites, _Parts({}, tuple(whole) if whole else None, others)  # type: ignore[arg-type]


def _read(state: State, names: Names) -> _Parts:
    sites, parts = _taken_apart(state, _SITE, _HEADS[names])
    turn = _orientation(names)
    for (layer, branch), found in sites.items():
        where = f"decoder.layers.{layer}.{branch}_hyper_connection." + "{}"
        phi, bias, *gates = _whole(found, ("mapping_proj.weight", "bias", *_GATES), where)
        parts.sites[layer, branch] = turn(phi), turn(bias), torch.cat(gates)
    _require_both_branches(parts)
    if names == "megatron":
        return _Parts(parts.sites, parts.head, _renamed(parts.others, _THEIR_NORM, _OUR_NORM))
    return parts


def _read_v4(state: State) -> _Parts:
    sites, parts = _taken_apart(state, _V4_SITE, _HEADS["deepseek_v4"])
    for (layer, branch), found in sites.items():
        where = f"layers.{layer}.hc_{branch}_" + "{}"
        phi, bias, gates = _whole(found, ("fn", "base", "scale"), where)
        parts.sites[layer, _FROM_V4[branch]] = swap_streams(phi), swap_streams(bias), gates
    _require_both_branches(parts)
    return parts


def _require_both_branches(parts: _Parts) -> None:
    for layer, branch in parts.sites:
        other = "mlp" if branch == "self_attention" else "self_attention"
        if (layer, other) not in parts.sites:
            raise UserError(
                f"layer {layer} has a hyper-connection around its {branch} branch and none around "
                f"its {other} branch ({_TO_V4[other]} in DeepSeek-V4's names)"
            )


def _write(parts: _Parts, names: Names) -> dict[str, Any]:
    turn = _orientation(names)
    theirs = names == "megatron"
    state = _renamed(parts.others, _OUR_NORM, _THEIR_NORM) if theirs else dict(parts.others)
    for (layer, branch), (phi, bias, gates) in parts.sites.items():
        prefix = f"decoder.layers.{layer}.{branch}_hyper_connection."
        state[f"{prefix}mapping_proj.weight"] = turn(phi)
        state |= {
            prefix + name: gate.clone() for name, gate in zip(_GATES, gates.split(1), strict=True)
        }
        state[f"{prefix}bias"] = turn(bias)
    return state | _head(parts, names)


def _write_v4(parts: _Parts) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for (layer, branch), (phi, bias, gates) in parts.sites.items():
        prefix = f"layers.{layer}.hc_{_TO_V4[branch]}_"
        state |= {f"{prefix}fn": swap_streams(phi), f"{prefix}base": swap_streams(bias)}
        state[f"{prefix}scale"] = gates
    return state | _head(parts, "deepseek_v4")


def _head(parts: _Parts, names: Names) -> dict[str, Tensor]:
    return dict(zip(_HEADS[names], parts.head, strict=True)) if parts.head else {}


def _orientation(names: Names) -> Callable[[Tensor], Tensor]:
    return _checked if names == "ours" else swap_streams


def _checked(packed: Tensor) -> Tensor:
    _num_streams(packed)
    return packed


def _renamed(entries: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {
        new + name.removeprefix(old) if name.startswith(old) else name: value
        for name, value in entries.items()
    }
