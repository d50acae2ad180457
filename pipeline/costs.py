"""How long every operation and message takes, and how many bytes a micro-batch holds."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.json_text import LARGEST, at, check_number, fields, parse

Number = int | float

_MOST_BANDWIDTH = 10**18

# What a stage cannot do in no time, and what to write instead of 0.
_TAKES_TIME = {
    "forward": "write the time that it takes",
    "dgrad": "write the time that it takes",
    "backward": "leave it out for dgrad + wgrad",
    "overlap": "leave it out for the forward and the backward one after the other",
}


def _check(name: str, value: Number | None) -> None:
    if value is not None and not 0 <= value <= LARGEST:
        raise ScheduleError(f"{name}={value} must be between 0 and {LARGEST:.0e}; change the unit")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCosts:
    """One stage, one micro-batch. Times are in one unit of your choice; integers stay exact.

    Attributes:
        forward: F.
        dgrad: I, the gradient of the stage's input.
        wgrad: W, the gradients of the weights.
        backward: B; None for ``dgrad + wgrad``.
        overlap: this stage's B together with the F of another; None for that F plus this B.
        recompute: R, the rebuild of what the hyper-connections dropped; part of B and I where the
            schedule has no R.
        held_bytes: kept from F to the end of B or W.
        rebuilt_bytes: what R (or, without R, B or I) adds until the end of B or I.
        split_rebuilt_bytes: the same where I and W are apart; None for ``rebuilt_bytes``.
        wgrad_bytes: of ``held_bytes``, what W needs and I does not free; None for all of it.
        wgrad_rebuilt_bytes: of ``split_rebuilt_bytes``, what W needs and I does not free.

    Raises:
        ScheduleError: a number is negative or above 1e12.
    """

    forward: Number = 1
    dgrad: Number = 1
    wgrad: Number = 1
    backward: Number | None = None
    overlap: Number | None = None
    recompute: Number = 0
    held_bytes: int = 0
    rebuilt_bytes: int = 0
    split_rebuilt_bytes: int | None = None
    wgrad_bytes: int | None = None
    wgrad_rebuilt_bytes: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))
        for part, whole, most in (
            ("wgrad_bytes", "held_bytes", self.held_bytes),
            ("wgrad_rebuilt_bytes", "split_rebuilt_bytes", self.rebuilt_by_split),
        ):
            value = getattr(self, part)
            if value is not None and value > most:
                raise ScheduleError(
                    f"{part}={value} is a part of {whole}={most} and cannot be larger"
                )

    @property
    def whole_backward(self) -> Number:
        """Time of B."""
        return self.dgrad + self.wgrad if self.backward is None else self.backward

    @property
    def rebuilt_by_split(self) -> int:
        """Bytes that R, or I without one, adds."""
        return self.rebuilt_bytes if self.split_rebuilt_bytes is None else self.split_rebuilt_bytes

    @property
    def kept_for_wgrad(self) -> int:
        """Bytes from the end of I to the end of W."""
        held = self.held_bytes if self.wgrad_bytes is None else self.wgrad_bytes
        return held + self.wgrad_rebuilt_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """All stages and the messages between ranks.

    Attributes:
        default: every stage that ``stages`` does not name.
        stages: exceptions, such as the embedding's and the loss's stage; -1 is the last stage.
        latency: time of a message of no bytes from rank to rank. A message delays the stage that
            needs it; the sender goes on at once, and messages do not wait for each other.
        message_bytes: size of an activation or gradient between stages.
        bandwidth: bytes per unit of time; None for messages that take the latency alone.
        unit: name of the unit of time: ``us``, ``ms``, ``s``, or empty for none.

    Raises:
        ScheduleError: a number is negative or above 1e12, or the bandwidth not above 0, or so low
            that a message takes more than 1e12.
    """

    default: StageCosts = StageCosts()
    stages: Mapping[int, StageCosts] = dataclasses.field(default_factory=dict)
    latency: Number = 0
    message_bytes: int = 0
    bandwidth: Number | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        _check("latency", self.latency)
        _check("message_bytes", self.message_bytes)
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ScheduleError(
                f"bandwidth={self.bandwidth} must be above 0; leave it out for no limit"
            )
        if not self.message_time <= LARGEST:
            raise ScheduleError(
                f"a message of message_bytes={self.message_bytes} at bandwidth={self.bandwidth} "
                f"takes more than {LARGEST:.0e}; bandwidth is in bytes per unit of time"
            )
        if self.unit not in ("", "us", "ms", "s"):
            raise ScheduleError(f"unit={self.unit!r} is not one of us, ms, s, or empty")

    @property
    def message_time(self) -> Number:
        """Time from the end of a stage to the start of the next one on another rank."""
        if self.bandwidth is None or self.message_bytes == 0:
            return self.latency
        return self.latency + self.message_bytes / self.bandwidth

    def of_stages(self, num_stages: int) -> list[StageCosts]:
        """Costs of every stage.

        Raises:
            ScheduleError: ``stages`` names one that the schedule does not have, or one twice.
        """
        result = [self.default] * num_stages
        named = set()
        for stage, costs in self.stages.items():
            if not -num_stages <= stage < num_stages:
                raise ScheduleError(
                    f"costs for stage {stage}, but the schedule has {num_stages} stages; "
                    f"name 0 to {num_stages - 1}, or -1 for the last"
                )
            if stage % num_stages in named:
                raise ScheduleError(
                    f"costs for stage {stage % num_stages} are given twice, also as "
                    f"{stage % num_stages - num_stages}; keep one"
                )
            named.add(stage % num_stages)
            result[stage] = costs
        return result


def costs_from_json(text: str, base: Costs | None = None) -> Costs:
    """Read a cost file: the fields of Costs, with those of StageCosts as objects.

    ``{"unit": "ms", "default": {"forward": 2.1, "dgrad": 2.3, "wgrad": 1.9}, "stages": {"-1":
    {"forward": 2.9}}, "latency": 0.02, "bandwidth": 5e7}``. A stage starts from ``default``, what
    is left out from ``base``.

    Raises:
        ScheduleError: no such field, one twice, a value of the wrong kind or out of range, no time
            for what takes time (a forward, a backward, an overlap), or no JSON.
    """
    base = Costs() if base is None else base
    given = fields(parse(text), _names(Costs))
    default = _stage(given.pop("default", {}), base.default, "default")
    stages = dict(base.stages)
    named: dict[int, str] = {}
    for key, value in fields(given.pop("stages", {}), None, "stages").items():
        if not re.fullmatch("-?[0-9]{1,9}", key):
            raise ScheduleError(
                f"stages: {key!r} is not a stage number; write an object such as "
                '{"0": {"forward": 2}, "-1": {"forward": 3}}'
            )
        stage = int(key)
        if stage in named:
            raise ScheduleError(f"stages: {named[stage]!r} and {key!r} are one stage; keep one")
        named[stage] = key
        stages[stage] = _stage(value, default, f"stages.{key}")
    for name, value in given.items():
        if name == "bandwidth":
            check_number(name, value, zero="leave it out for no limit", most=_MOST_BANDWIDTH)
        elif name != "unit":
            check_number(name, value, whole=name == "message_bytes")
    return dataclasses.replace(base, default=default, stages=stages, **given)


def _stage(value: Any, base: StageCosts, where: str) -> StageCosts:
    given = fields(value, _names(StageCosts), where)
    for name, number in given.items():
        whole = name.endswith("_bytes")
        check_number(at(where, name), number, whole=whole, zero=_TAKES_TIME.get(name))
    try:
        return dataclasses.replace(base, **given)
    except ScheduleError as error:
        raise ScheduleError(f"{where}: {error}") from None


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
