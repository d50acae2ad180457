"""The flags and variables of the hyper-connections, and what docs/megatron.md promises of them."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.launch import cli
from mhc_megatron.pretrain.options import (
    add_mhc_args,
    log_timing_from_args,
    log_timing_from_environment,
    mhc_from_args,
    mhc_from_environment,
    mhc_options,
)

_DOCS = Path(__file__).resolve().parents[1] / "docs" / "megatron.md"
_OTHERS = {
    "num_streams": 3,
    "variant": "two_pass",  # the other one excludes a recompute; it has a test of its own
    "projection": "permutation",
    "sinkhorn_iterations": 5,
    "init_gate": 0.25,
    "rms_eps": 1e-20,
    "sinkhorn_eps": 1e-3,
    "contraction": "learned",
    "backend": "reference",
    "recompute": "block",
    "recompute_block": 4,
}


def _parse(*flags: str) -> MHCConfig:
    return mhc_from_args(add_mhc_args(argparse.ArgumentParser()).parse_args(flags))


def test_every_field_is_a_flag_and_a_variable() -> None:
    fields = [field.name for field in dataclasses.fields(MHCConfig)]
    others = ["schedule", "overlap", "messages", "log_timing"]
    assert [option.name for option in mhc_options()] == [*fields, *others]
    assert _OTHERS.keys() == set(fields)
    expected = MHCConfig(**_OTHERS)
    given = {option.name: option for option in mhc_options() if option.name in _OTHERS}
    assert _parse(*(f"{o.flag}={_OTHERS[name]}" for name, o in given.items())) == expected
    variables = {o.variable: str(_OTHERS[name]) for name, o in given.items()}
    assert mhc_from_environment({**variables, "HOME": "x"}) == expected
    assert all(len(option.help) > 20 for option in mhc_options())


def test_the_variant_is_a_flag_and_a_variable() -> None:
    expected = MHCConfig(variant="single_pass")
    assert _parse("--mhc-variant=single_pass") == expected
    assert mhc_from_environment({"MHC_VARIANT": "single_pass"}) == expected


def test_timing_is_a_flag_and_a_variable_and_off_by_default() -> None:
    parser = add_mhc_args(argparse.ArgumentParser())
    assert log_timing_from_args(parser.parse_args([])) == 0 == log_timing_from_environment({})
    assert log_timing_from_args(parser.parse_args(["--mhc-log-timing=100"])) == 100
    assert log_timing_from_environment({"MHC_LOG_TIMING": "100"}) == 100
    with pytest.raises(UserError) as refused:
        mhc_from_environment({"MHC_LOG_TIMING": "yes"})
    assert str(refused.value) == (
        "MHC_LOG_TIMING=yes is not a number of iterations; use 0 for no timing, or as many as "
        "--log-interval"
    )


def test_without_flags_and_variables_the_defaults_hold() -> None:
    assert _parse() == MHCConfig() == mhc_from_environment({})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mhc-num-streams=0", "--mhc-num-streams=0 must be at least 1 (the paper uses 4)"),
        ("--mhc-num-streams=two", "--mhc-num-streams=two is not an integer"),
        (
            "--mhc-log-timing=-1",
            "--mhc-log-timing=-1 is not a number of iterations; use 0 for no timing, or as many "
            "as --log-interval",
        ),
        ("--mhc-contraction=last", "--mhc-contraction=last is not one of mean, sum, learned, read"),
        (
            "--mhc-recompute=block",
            "--mhc-recompute='block' needs --mhc-recompute-block, the sublayers of a block; set "
            "it, or use --mhc-recompute='auto'",
        ),
        (
            "--mhc-projection=permutation --mhc-num-streams=5",
            "--mhc-projection='permutation' with --mhc-num-streams=5 would mix 120 permutations; "
            "use at most 4 streams, or --mhc-projection='sinkhorn'",
        ),
    ],
)
def test_an_error_names_the_flag(flags: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        _parse(*flags.split())
    assert str(refused.value) == message


def test_an_error_names_the_variable() -> None:
    with pytest.raises(UserError, match=r"^MHC_RMS_EPS=0.0 must be positive$"):
        mhc_from_environment({"MHC_RMS_EPS": "0"})
    with pytest.raises(UserError, match=r"^unknown variable MHC_STREAMS; there are MHC_NUM_STREA"):
        mhc_from_environment({"MHC_STREAMS": "4"})


def test_a_layer_spec_cannot_choose_the_schedule() -> None:
    assert mhc_from_environment({"MHC_SCHEDULE": "megatron"}) == MHCConfig()
    with pytest.raises(UserError) as refused:
        mhc_from_environment({"MHC_SCHEDULE": "dualpipe_v"})
    assert str(refused.value) == (
        "MHC_SCHEDULE=dualpipe_v: a layer spec cannot reach the pipeline; leave it out, or use "
        "--mhc-schedule of mhc-megatron pretrain (docs/megatron.md)"
    )


def test_arguments_without_the_flags_are_refused() -> None:
    with pytest.raises(UserError) as refused:
        mhc_from_args(argparse.Namespace())
    assert str(refused.value) == (
        "the parsed arguments have no --mhc-num-streams; hand add_mhc_args to Megatron as "
        "extra_args_provider, and do not use --yaml-cfg, which replaces all arguments"
    )


def test_the_command_refuses_a_wrong_flag_before_megatron_is_imported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["pretrain", "--num-layers", "2", "--mhc-num-streams", "0"]) == 2
    assert capsys.readouterr().err == (
        "mhc-megatron: error: --mhc-num-streams=0 must be at least 1 (the paper uses 4)\n"
    )


def test_the_documented_diff_adds_at_most_five_lines() -> None:
    text = _DOCS.read_text().partition("```diff\n")[2].partition("```")[0]
    added = [line for line in text.splitlines() if line.startswith("+")]
    assert 1 <= len(added) <= 5
    assert any("hyper_connect(args, model_cfg)" in line for line in added)
