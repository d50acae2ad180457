"""``mhc-megatron plan memory`` from a recipe to its table."""

import re

import pytest

from mhc_megatron.launch import cli


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["plan", "memory", *arguments]) == 0
    return capsys.readouterr().out


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    """One stage of 60 sublayers: the paper's shapes, where a block of 6 keeps 76 C instead of 360.

    One C of 4096 tokens and 2560 channels in bf16 is 20 MiB.
    """
    sizes = ["model.hidden_size=2560", "model.num_layers=30", "model.seq_length=4096"]
    sizes += [
        "model.num_attention_heads=20",
        "micro_batch_size=1",
        "global_batch_size=1",
        "mhc.recompute=auto",
    ]
    text = plan(capsys, "--recipe", "gpt-100m", "--branch-width", "1", "--set", *sizes)
    lines = text.splitlines()
    assert lines[0] == (
        "one_f_one_b: 1 ranks, 1 stages of 60 sublayers, 1 micro-batches; n=4, C=2560, "
        "4,096 tokens, bf16"
    )
    rows = {tuple(line.split()[:2]): line.split("  ") for line in lines[2:] if line}
    cells = {name: [cell.strip() for cell in row if cell][-4:] for name, row in rows.items()}
    # Kept of the rank besides: a branch's output, and what the branch itself keeps, 2 C of 60;
    # float32 coefficients, the logits behind them and two RMS; phi in two parts of bf16.
    rest = 60 * (4 * 4096 * (24 + 24 + 2) + 2 * 2 * 24 * 4 * 2560)
    assert cells["none", "-"] == ["-", _gib(360), "-", _gib(360 + 120, rest)]
    assert cells["block", "4"] == ["480.00 MiB", _gib(60 + 24), "-", _gib(60 + 24 + 120, rest)]
    assert cells["auto*", "6"] == ["720.00 MiB", _gib(40 + 36), "-", _gib(40 + 36 + 120, rest)]
    assert cells["stage", "60"] == [_gib(360), _gib(4 + 360), "-", _gib(4 + 360 + 120, rest)]
    assert lines[-8:-4] == [
        "outputs of branches   C                                        1.17 GiB",
        "branches              1 C                                      1.17 GiB",
        "coefficients          50 float32 numbers a token              46.88 MiB",
        "phi for the kernels   2 x 24 x 4 C of 2 bytes, not per token  56.25 MiB",
    ]
    assert lines[-3] == f"* the recipe's; peak activations by rank: {_gib(40 + 36 + 120, rest)}"
    assert lines[-2].startswith("lowest peak under this schedule: auto, block 6;")
    assert lines[-1] == (
        "not counted: embedding, final norm, logits and loss, gradients and what an action "
        "allocates for itself, what backend='reference' keeps more than the kernels"
    )


def _gib(width: int, rest: int = 0) -> str:
    return f"{(width * 20 * 2**20 + rest) / 2**30:.2f} GiB"


def test_what_is_not_counted_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(
        capsys,
        "--set",
        "model.mtp_num_layers=2",
        "mhc.backend=triton",
    )
    assert text.splitlines()[-1] == (
        "not counted: embedding, final norm, logits and loss, gradients and what an action "
        "allocates for itself, model.mtp_num_layers=2, whose layers keep the plain residual"
    )
    sizes = ["parallel.overlap=all", "mhc.recompute=auto"]
    text = plan(capsys, "--recipe", "stdlib-small-dualpipe-v", "--set", *sizes)
    assert "branch inputs that an interleaved backward keeps to its end" in text.splitlines()[-1]


def test_what_waits_for_weight_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    """Of eight sublayers every branch's input, 2 C, besides the first states of two blocks.

    On the last rank one micro-batch is alive. Its I has the states of a block besides.
    """
    sizes = ["parallel.schedule=zb_h1", "model.num_layers=8", "global_batch_size=2"]
    policy = ["mhc.recompute=block", "mhc.recompute_block=4"]
    recipe = ("--recipe", "stdlib-small-pp", "--branch-width", "1")
    text = plan(capsys, *recipe, "--set", *sizes, *policy)
    [row] = [line for line in text.splitlines() if line.startswith("block*")]
    # C of 512 tokens and 128 channels in float32 is 1/4 MiB.
    assert re.split("  +", row)[-2] == f"{(2 * 4 + 8 * 2) / 4:.2f} MiB"
    coefficients = 8 * 512 * 4 * 50 / 2**20
    alive = (8 * 2 + 2 * 4 + 4 * 4 + 8 * 2) / 4 + coefficients
    assert f", {alive:.2f} MiB" in text.splitlines()[-3]


def test_peak_under_a_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(
        capsys,
        "--recipe",
        "stdlib-small-dualpipe-v",
        "--set",
        "mhc.recompute=block",
        "mhc.recompute_block=2",
    )
    assert text.startswith("dualpipe_v: 2 ranks, 4 stages of 2 sublayers, 8 micro-batches; n=4")
    assert "block*" in text and "peak activations by rank: " in text


def test_stages_of_their_own_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    """6 and 2 sublayers: blocks of 2 and 1 keep 3 and 2 first states, of 4 C each."""
    sizes = ["parallel.first_stage_layers=3", "mhc.recompute=auto"]
    text = plan(capsys, "--recipe", "stdlib-small-pp", "--branch-width", "1", "--set", *sizes)
    assert "2 stages of 2 to 6 sublayers" in text
    # C of 512 tokens and 128 channels in float32 is 1/4 MiB, 50 float32 numbers a token are 1/10;
    # rank 0 holds two micro-batches.
    first, last = 2 * (3 * 4 + 6 * 2) + 2 * 6, (2 * 4 + 2 * 2) + 6
    each = 512 * 4 * 50 / 2**20
    expected = f"{first / 4 + 2 * 6 * each:.2f} MiB, {last / 4 + 2 * each:.2f} MiB"
    assert f"peak activations by rank: {expected}" in text


def test_the_lowest_peak_is_of_all_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    """GPipe holds four micro-batches, so that longer blocks than auto's pay: 6 of 12."""
    sizes = ["parallel.schedule=gpipe", "model.num_layers=12", "mhc.recompute=auto"]
    text = plan(capsys, "--recipe", "stdlib-small-pp", "--set", *sizes)
    assert "lowest peak under this schedule: block, block 6;" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.residual=plain"], "model.residual='plain' has no streams to recompute"),
        (
            ["mhc.recompute=block", "mhc.recompute_block=9"],
            "recompute_block=9 is above the 8 sublayers of a stage",
        ),
        (["mhc.recompute=best"], "mhc.recompute=best is not one of none, block, auto, stage"),
        (
            ["mhc.variant=single_pass"],
            "mhc.variant='single_pass' has no recompute policies to compare, since a rebuild reads "
            "with the sublayer's own H_pre; set mhc.variant=two_pass",
        ),
    ],
)
def test_refusals(overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "memory", "--set", *overrides]) == 2
    assert message in capsys.readouterr().err
