"""``rollbacks.json`` in a run's folder: the steps that a run has left out, and why."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mhc_megatron.report.metrics import replace_file

_FILE = "rollbacks.json"


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """One return to a checkpoint.

    Attributes:
        step: that was bad and is left out, from 1.
        back_to: completed steps of the checkpoint.
        problem: what was wrong with the step.
    """

    step: int
    back_to: int
    problem: str


def read_rollbacks(folder: Path) -> list[Rollback]:
    """All of a run, in the order in which they happened."""
    path = folder / _FILE
    if not path.is_file():
        return []
    return [Rollback(**values) for values in json.loads(path.read_text())]


def write_rollbacks(folder: Path, rollbacks: Sequence[Rollback]) -> None:
    """Replace the file, whole or not at all."""
    values = [dataclasses.asdict(rollback) for rollback in rollbacks]
    replace_file(folder / _FILE, json.dumps(values, indent=2) + "\n")


def forget_rollbacks(folder: Path) -> None:
    """Remove an earlier run's file."""
    (folder / _FILE).unlink(missing_ok=True)
