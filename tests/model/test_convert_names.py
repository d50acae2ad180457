"""Names of hyper-connections in three projects: what is swapped, renamed and refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_megatron import kernels
from mhc_megatron.convert.names import Names, convert_names, swap_streams
from mhc_megatron.errors import UserError
from mhc_megatron.launch import cli

C = 3
PHI, BIAS = "mapping_proj.weight", "bias"


def ours(n: int = 4, *, branches: bool = True) -> dict[str, Tensor]:
    """Two layers and a learned contraction, drawn; with an entry of a branch and the norm's."""
    generator = torch.Generator().manual_seed(7)
    num_logits = 2 * n + n * n
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in (0, 1):
        for branch in ("self_attention", "mlp"):
            prefix = f"decoder.layers.{layer}.{branch}_hyper_connection."
            shapes |= {prefix + PHI: (num_logits, n * C), prefix + BIAS: (num_logits,)}
            shapes |= {f"{prefix}alpha_{kind}": (1,) for kind in ("pre", "post", "res")}
    head = "decoder.final_layernorm.contraction."
    shapes |= {f"{head}weight": (n, n * C), f"{head}bias": (n,), f"{head}scale": (1,)}
    if branches:
        shapes |= {"decoder.layers.0.mlp.linear_fc1.weight": (2, 2)}
        shapes |= {"decoder.final_layernorm.norm.weight": (C,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("n", [1, 2, 4], ids="n{}".format)
@pytest.mark.parametrize("names", ["megatron", "deepseek_v4"])
def test_there_and_back_are_the_same_bits(names: Names, n: int) -> None:
    state = ours(n, branches=names == "megatron")
    there = convert_names(state, "ours", names)
    assert not state.keys() & there.keys() or names == "megatron"
    assert same(convert_names(there, names, "ours"), state)
    # By way of the third, too: Megatron and DeepSeek-V4 have one orientation.
    alone = convert_names(there, names, "megatron", only_hyper_connections=True)
    v4 = convert_names(alone, "megatron", "deepseek_v4")
    assert same(v4, convert_names(state, "ours", "deepseek_v4", only_hyper_connections=True))


def test_the_names_are_those_of_the_two_projects() -> None:
    state = ours()
    v4 = convert_names(state, "ours", "deepseek_v4", only_hyper_connections=True)
    assert sorted(v4) == sorted(
        [f"hc_head_{x}" for x in ("fn", "base", "scale")]
        + [
            f"layers.{i}.hc_{b}_{x}"
            for i in (0, 1)
            for b in ("attn", "ffn")
            for x in ("fn", "base", "scale")
        ]
    )
    prefix = "decoder.layers.1.mlp_hyper_connection."
    gates = [state[f"{prefix}alpha_{kind}"] for kind in ("pre", "post", "res")]
    assert torch.equal(v4["layers.1.hc_ffn_scale"], torch.cat(gates))
    megatron = convert_names(state, "ours", "megatron")
    assert torch.equal(megatron[prefix + PHI], v4["layers.1.hc_ffn_fn"])
    assert torch.equal(megatron["decoder.hc_head_fn"], v4["hc_head_fn"])
    norm, fc1 = "decoder.final_layernorm.norm.weight", "decoder.layers.0.mlp.linear_fc1.weight"
    assert torch.equal(megatron["decoder.final_layernorm.weight"], state[norm])
    assert torch.equal(megatron[fc1], state[fc1]) and norm not in megatron


def test_the_converted_mapping_is_the_transposed_one() -> None:
    n = 3
    state = ours(n)
    bias = state["decoder.layers.0.mlp_hyper_connection.bias"]
    bias[2 * n + 1] += 3.0  # far from symmetric
    theirs = swap_streams(bias)
    # exp, then V4 normalises rows of comb where ours normalises columns of H_res.
    comb = theirs[2 * n :].reshape(n, n).exp()
    for _ in range(20):
        comb = comb / comb.sum(1, keepdim=True)
        comb = comb / comb.sum(0, keepdim=True)
    res = kernels.sinkhorn(bias[2 * n :].reshape(n, n), iterations=20)
    torch.testing.assert_close(comb.T, res)  # float32, 40 normalisations in another form
    assert not torch.allclose(comb, res, atol=1e-2)  # a forgotten swap would be seen


def broken(change: Any, names: Names = "ours") -> str:
    state = ours()
    if names != "ours":
        state = convert_names(state, "ours", names, only_hyper_connections=True)
    change(state)
    with pytest.raises(UserError) as caught:
        convert_names(state, names, "megatron" if names == "ours" else "ours")
    return str(caught.value)


ATTENTION = "decoder.layers.0.self_attention_hyper_connection."


def test_what_is_missing_or_unknown_is_named() -> None:
    assert broken(lambda s: s.pop(f"{ATTENTION}alpha_res")).endswith(
        f"missing: {ATTENTION}alpha_res"
    )
    assert broken(lambda s: s.update({f"{ATTENTION}gamma": s[f"{ATTENTION}bias"]})).endswith(
        f"unknown: {ATTENTION}gamma"
    )
    assert broken(lambda s: s.pop("layers.1.hc_attn_base"), "deepseek_v4").endswith(
        "missing: layers.1.hc_attn_base"
    )
    assert broken(lambda s: s.pop("hc_head_fn"), "deepseek_v4").endswith("missing: hc_head_fn")
    only_mlp = broken(lambda s: [s.pop(k) for k in list(s) if k.startswith(ATTENTION)])
    assert only_mlp.startswith("layer 0 has a hyper-connection around its mlp branch and none")
    # mHC-lite mixes 24 permutations.
    assert broken(lambda s: s.update({f"{ATTENTION}bias": torch.zeros(32)})).startswith(
        "32 logits per token are not 2n + n^2 of any n"
    )
    assert "no entry has a name of a hyper-connection" in broken(lambda s: s.clear())
    with pytest.raises(UserError, match=r"^decoder\.final_layernorm\.norm\.weight, .*fc1"):
        convert_names(ours(), "ours", "deepseek_v4")
    mtp = {"mtp.0.hc_attn_fn": torch.zeros(1)}
    v4 = convert_names(ours(), "ours", "deepseek_v4", only_hyper_connections=True)
    with pytest.raises(UserError, match=r"^mtp\.0\.hc_attn_fn: only"):
        convert_names(v4 | mtp, "deepseek_v4", "ours")


def test_the_command_reads_and_writes_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = ours()
    torch.save(state, tmp_path / "ours.pt")

    def run(source: str, target: str, *more: str) -> tuple[int, str]:
        files = [str(tmp_path / f"{source}.pt"), "--out", str(tmp_path / f"{target}.pt")]
        names = ["--from", source.split(".")[0], "--to", target.split(".")[0]]
        status = cli.main(["convert", "names", *files, *names, *more])
        return status, re.sub(r"\s+", " ", "".join(capsys.readouterr()))

    status, text = run("ours", "deepseek_v4", "--only-hyper-connections")
    assert status == 0 and "deepseek_v4.pt: 15 entries from the 25 of" in text
    assert run("deepseek_v4", "megatron")[0] == 0
    written = torch.load(tmp_path / "megatron.pt")
    assert same(written, convert_names(state, "ours", "megatron", only_hyper_connections=True))
    assert run("ours", "megatron") == (
        2,
        f"mhc-megatron: error: {tmp_path}/megatron.pt exists; remove it or choose another --out ",
    )
    (tmp_path / "megatron.2.pt").write_text("no archive")
    assert "megatron.2.pt is not a state dict: " in run("megatron.2", "ours.2")[1]
    assert "megatron.3.pt does not exist; name what" in run("megatron.3", "ours.3")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "deepseek_v4.pt",
        "megatron.2.pt",
        "megatron.pt",
        "ours.pt",
    ]
