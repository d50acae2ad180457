"""The files of a run that people and reports read: metrics.jsonl, gains.jsonl and run.json.

``metrics.jsonl`` has one JSON object per line. Every line has ``step`` (1-based: the number of
steps done). A training step adds ``loss`` (nats per token), ``lr``, ``grad_norm`` (before
clipping), ``tokens_per_s`` and ``step_ms``, and where NVML tells ``joules`` (of all GPUs, since the
step before ended), ``joules_per_token`` and ``gpu_busy`` (0 to 1); a validation adds
``valid_loss``, on the step's line or on one of its own. Other keys are allowed.

``gains.jsonl`` has one line per probe of the residual mappings: ``step``, ``sublayers`` (names in
depth order), and ``single`` and ``composite``, each with the lists ``forward``, ``backward`` and
``log_column`` (``mhc_megatron.gains``).

JSON has no infinities: they and NaN are written as the texts "Infinity", "-Infinity" and "NaN",
which the readers turn back into numbers.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from mhc_megatron.errors import UserError

if TYPE_CHECKING:  # reading metrics takes no torch
    from mhc_megatron.gains import Gains

METRICS_FILE = "metrics.jsonl"
GAINS_FILE = "gains.jsonl"
RUN_FILE = "run.json"

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """What a reader found.

    Attributes:
        lines: the complete lines, in order.
        truncated: a last line was cut off, as when a run is killed while it writes; it is not
            among ``lines``.
    """

    lines: list[dict[str, Any]]
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What run.json says about a run.

    Attributes:
        config: the nested configuration.
        environment: versions and machine, for example ``torch``, ``megatron_core``, ``python``,
            ``device``, ``world_size``, ``commit``.
        status: ``running`` until the run ends; ``stopped`` when it was told to and has saved.
        parameters: parameters of the whole model.
        error: the message of a failed run.
    """

    config: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    status: Literal["running", "finished", "stopped", "failed"]
    parameters: int | None = None
    error: str | None = None


class MetricsLog:
    """Appends to a run's metrics.jsonl and gains.jsonl; every line is flushed at once.

    Args:
        folder: the run directory, made if it is missing.
        done: completed steps, 0 for a new run. A resumed run keeps the lines of its first ``done``
            steps; later ones, written after the checkpoint it resumes from, are dropped, so that
            no step appears twice. A new run drops all lines.

    Raises:
        UserError: a line that has to be kept cannot be read.
    """

    def __init__(self, folder: Path | str, *, done: int = 0) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = [
            [line for line in _read(folder / name).lines if line["step"] <= done] if done else []
            for name in (METRICS_FILE, GAINS_FILE)
        ]
        # Both are read before either is replaced: a line that cannot be read changes nothing.
        for name, lines in zip((METRICS_FILE, GAINS_FILE), kept, strict=True):
            replace_file(folder / name, "".join(_encoded(line) for line in lines))
        self._metrics = (folder / METRICS_FILE).open("a", encoding="utf-8")
        self._gains = (folder / GAINS_FILE).open("a", encoding="utf-8")

    def write(self, line: Mapping[str, float]) -> None:
        """Append one line of metrics; it must have ``step``."""
        assert isinstance(line["step"], int), line
        self._metrics.write(_encoded(line))
        self._metrics.flush()

    def write_gains(self, step: int, *, sublayers: Sequence[str], gains: "Gains") -> None:
        """Append one probe of the residual mappings.

        Args:
            step: steps done, as in the metrics.
            sublayers: names in depth order, as many as each list in ``gains`` is long.
            gains: what ``gain_magnitudes`` returned.
        """
        assert len(sublayers) == len(gains.single.forward)
        line = {"step": step, "sublayers": list(sublayers), **dataclasses.asdict(gains)}
        self._gains.write(_encoded(line))
        self._gains.flush()

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._gains.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(folder: Path | str) -> JsonLines:
    """All metrics of a run.

    Raises:
        UserError: no such folder, no metrics.jsonl in it, no complete line, or a line other than
            the last that is no JSON object with a ``step``.
    """
    path = Path(folder) / METRICS_FILE
    if not path.parent.is_dir():
        raise UserError(f"run folder {str(folder)!r} does not exist; pass the --out of a training")
    if not path.is_file():
        raise UserError(
            f"{str(folder)!r} has no {METRICS_FILE}; pass the run directory of a training"
        )
    found = _read(path)
    if not found.lines:
        raise UserError(f"{str(path)!r} has no complete line; train at least one step first")
    return found


def read_gains(folder: Path | str) -> JsonLines:
    """All probes of a run; none if there is no gains.jsonl.

    Raises:
        UserError: a line other than the last is no JSON object with a ``step``.
    """
    return _read(Path(folder) / GAINS_FILE)


def write_run(folder: Path | str, info: RunInfo) -> None:
    """Write run.json, whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / RUN_FILE, json.dumps(dataclasses.asdict(info), indent=2) + "\n")


def read_run(folder: Path | str) -> RunInfo:
    """Read run.json; keys that this version does not know are passed over.

    Raises:
        UserError: there is none, or it is not what ``write_run`` writes.
    """
    path = Path(folder) / RUN_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {item.name: values[item.name] for item in dataclasses.fields(RunInfo)}
    except FileNotFoundError as error:
        raise UserError(
            f"{str(path)!r} does not exist; pass the run directory of a training"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({error!r}); train again to write it anew"
        ) from error
    return RunInfo(**known)


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` so that a reader, or a crash, meets the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _encoded(line: Mapping[str, Any]) -> str:
    return json.dumps(_as_json(line), allow_nan=False) + "\n"


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _read(path: Path) -> JsonLines:
    """The lines of a file; none if it is missing."""
    if not path.is_file():
        return JsonLines(lines=[], truncated=False)
    text = path.read_text(encoding="utf-8", errors="replace")
    texts = text.removesuffix("\n").split("\n") if text else []
    lines, bad = _parsed(texts)
    if bad is None:
        return JsonLines(lines=lines, truncated=False)
    # A complete line ends in a newline, so only the rest after the last one can be a torn write.
    if bad < len(texts) or text.endswith("\n"):
        raise UserError(
            f"{str(path)!r}, line {bad}: {texts[bad - 1][:60]!r} is not a JSON object with a step; "
            "remove the line"
        )
    return JsonLines(lines=lines, truncated=True)


def _parsed(texts: Iterable[str]) -> tuple[list[dict[str, Any]], int | None]:
    """Lines up to the first that is not one of ours, and its 1-based number."""
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = _from_json(json.loads(text))
        except ValueError:
            return lines, number
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            return lines, number
        lines.append(line)
    return lines, None
