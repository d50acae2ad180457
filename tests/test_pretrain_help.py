"""``mhc-megatron pretrain --help`` lists the flags, and a bad value is named with its flag."""

import pytest

from mhc_megatron.launch.cli import main
from mhc_megatron.pretrain.options import mhc_options


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["pretrain", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert [option.flag for option in mhc_options() if option.flag not in text] == []


def test_a_bad_value_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--mhc-num-streams=0"]) == 2
    assert "--mhc-num-streams" in capsys.readouterr().err
