"""The console command: help, errors, exit statuses, and that nothing heavy is imported early."""

import argparse
import importlib
import subprocess
import sys
import types

import pytest

from mhc_megatron.errors import UserError
from mhc_megatron.launch import cli


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A command ``fake NUMBER`` that returns NUMBER, or raises the exception put in here."""
    raised: list[object] = []

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("number", type=int)

    def run(args: argparse.Namespace) -> int:
        if raised:
            raise raised[0]
        return args.number

    module = types.SimpleNamespace(add_arguments=add_arguments, run=run)
    monkeypatch.setitem(sys.modules, "fake_command", module)
    command = cli.Command(name="fake", summary="returns NUMBER", module="fake_command")
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, command))
    return raised


def test_the_status_of_the_command_is_returned(outcome: list[object]) -> None:
    assert cli.main(["fake", "0"]) == 0
    assert cli.main(["fake", "1"]) == 1


def test_a_user_error_is_one_line(
    outcome: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome.append(UserError("steps=0\nmust be at least 1"))
    assert cli.main(["fake", "0"]) == 2
    assert capsys.readouterr() == ("", "mhc-megatron: error: steps=0 must be at least 1\n")


def test_an_interruption_has_its_own_status(
    outcome: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome.append(KeyboardInterrupt())
    assert cli.main(["fake", "0"]) == 130
    assert capsys.readouterr().err == "mhc-megatron: interrupted\n"


@pytest.mark.parametrize("error", [ValueError("defect"), RuntimeError("defect")])
def test_a_defect_keeps_its_traceback(outcome: list[object], error: Exception) -> None:
    outcome.append(error)
    with pytest.raises(type(error), match="defect"):
        cli.main(["fake", "0"])


def test_bad_arguments_of_a_command_have_status_2(
    outcome: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["fake", "three"])
    assert exit.value.code == 2
    assert "mhc-megatron fake: error: argument number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dokter"], "unknown command 'dokter'; did you mean 'doctor'? commands: train, compare,"),
        (["qqqq"], "unknown command 'qqqq'; commands: train, compare, pretrain, data, convert, "),
        (["--", "train"], "a command must come first; commands: train"),
    ],
)
def test_an_unknown_command_gets_the_nearest(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"mhc-megatron: error: {message}")


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "examples:" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"  {command.name} " in shown and command.summary in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    name, number = capsys.readouterr().out.split()
    assert name == "mhc-megatron" and number[0].isdigit()


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_with_an_example(
    command: cli.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([command.name, "--help"])
    assert exit.value.code == 0
    assert f"mhc-megatron {command.name}" in capsys.readouterr().out.split("examples:")[1]


def test_every_command_exists() -> None:
    for command in cli.COMMANDS:
        module = importlib.import_module(command.module)
        assert callable(getattr(module, command.add_arguments))
        assert callable(getattr(module, command.run))


def test_help_and_the_doctor_need_neither_torch_nor_megatron() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, megatron=None)\n"
        "from mhc_megatron.launch import cli\n"
        "for command in ([], ['data'], ['doctor']):\n"
        "    try: cli.main([*command, '--help'])\n"
        "    except SystemExit as exit: assert exit.code == 0\n"
        "assert cli.main(['doctor', '--recipe', 'stdlib-small']) == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
