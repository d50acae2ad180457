"""Overriding, storing and comparing nested configurations."""

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhc_megatron.errors import UserError
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.overrides import (
    apply_overrides,
    differences,
    flatten,
    from_dict,
    to_dict,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 2
    rate: float = 0.5
    label: str = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    other: Inner = field(default_factory=Inner)
    on: bool = False
    mode: Literal["fast", "slow"] = "fast"
    level: Literal[1, 2] = 1
    limit: int | None = None
    total: int = 2

    def __post_init__(self) -> None:
        if self.total != self.inner.size:
            raise UserError(f"total={self.total} differs from inner.size={self.inner.size}")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("inner.label=none", "inner.label", "none"),
        ("inner.label=a=b", "inner.label", "a=b"),
        ("inner.label=", "inner.label", ""),
        ("inner.rate=1e-3", "inner.rate", 1e-3),
        ("inner.rate=2", "inner.rate", 2.0),
        ("on=True", "on", True),
        ("on=false", "on", False),
        ("mode=slow", "mode", "slow"),
        ("level=2", "level", 2),
        ("limit=7", "limit", 7),
        ("limit=None", "limit", None),
        (" inner.rate = 3 ", "inner.rate", 3.0),
    ],
)
def test_one_value_changes_and_no_other(override: str, key: str, value: object) -> None:
    changed = apply_overrides(Outer(), [override])
    assert flatten(changed) == {**flatten(Outer()), key: value}
    assert type(flatten(changed)[key]) is type(value)


def test_checks_across_fields_see_the_final_values_only() -> None:
    changed = apply_overrides(Outer(), ["total=5", "inner.size=5"])
    assert (changed.total, changed.inner.size) == (5, 5)
    with pytest.raises(UserError, match=r"total=5 differs from inner\.size=2"):
        apply_overrides(Outer(), ["total=5"])


def test_the_last_override_of_a_key_counts() -> None:
    assert apply_overrides(Outer(), ["inner.rate=1", "inner.rate=2"]).inner.rate == 2


def test_nothing_to_do_returns_an_equal_configuration() -> None:
    assert apply_overrides(TrainConfig(), []) == TrainConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.size=two", "inner.size=two is not an integer"),
        ("inner.size=2.5", "inner.size=2.5 is not an integer"),
        ("inner.rate=fast", "inner.rate=fast is not a finite number"),
        ("inner.rate=nan", "inner.rate=nan is not a finite number"),
        ("on=1", "on=1 is not true or false"),
        ("mode=quick", "mode=quick is not one of fast, slow"),
        ("limit=few", "limit=few is not an integer or none"),
        ("inner.size", "override 'inner.size' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
        (
            "inner=3",
            "inner is a section, not a value; set one of inner.size, inner.rate, inner.label",
        ),
        (
            "inner.sise=3",
            "unknown key 'inner.sise': did you mean inner.size? inner has size, rate, label",
        ),
        (
            "rate=3",
            "unknown key 'rate': did you mean inner.rate or other.rate? "
            "the top level has inner, other, on, mode, level, limit, total",
        ),
        ("total.size.x=3", "unknown key 'total.size.x': total is a value and has no parts"),
        (
            "zzzzzz=3",
            "unknown key 'zzzzzz': the top level has inner, other, on, mode, level, limit, total",
        ),
    ],
)
def test_a_bad_override_is_one_line_that_says_what_is_right(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides(Outer(), [override])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("overrides", "nearest"),
    [
        (["paralel.tensor=2"], "parallel.tensor"),
        (["parallel.tensr=2"], "parallel.tensor"),
        (["tensor=2"], "parallel.tensor"),
        (["step=2"], "steps"),
    ],
)
def test_the_nearest_key_of_a_training_configuration(overrides: list[str], nearest: str) -> None:
    with pytest.raises(UserError, match=rf"did you mean {nearest}\?"):
        apply_overrides(TrainConfig(), overrides)


def test_a_real_layout_needs_all_its_overrides_at_once() -> None:
    config = apply_overrides(
        TrainConfig(),
        ["parallel.sequence=true", "parallel.tensor=2", "model.num_moe_experts=4"],
    )
    assert config.parallel.world_size == 2 and config.model.num_moe_experts == 4


def test_flatten_names_every_leaf_in_order() -> None:
    keys = list(flatten(TrainConfig()))
    assert keys[0] == "model.residual" and keys[-1] == "fp8_amax_compute_algo"
    assert "mhc.projection" in keys and "model" not in keys


def test_differences_name_the_key_and_both_values() -> None:
    a = TrainConfig()
    b = apply_overrides(a, ["mhc.num_streams=2", "steps=7"])
    assert differences(a, b) == [("mhc.num_streams", 4, 2), ("steps", 200, 7)]
    assert differences(a, a) == []


@given(
    size=st.integers(1, 10**9),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    label=st.text(),
    limit=st.none() | st.integers(),
)
def test_json_round_trip(size: int, rate: float, label: str, limit: int | None) -> None:
    outer = Outer(inner=Inner(size=size, rate=rate, label=label), total=size, limit=limit)
    assert from_dict(Outer, json.loads(json.dumps(to_dict(outer)))) == outer


@given(size=st.integers(1, 10**9), rate=st.floats(allow_nan=False, allow_infinity=False))
def test_what_flatten_prints_apply_overrides_reads(size: int, rate: float) -> None:
    outer = Outer(inner=Inner(size=size, rate=rate), total=size, on=True, mode="slow", level=2)
    texts = [f"{key}={value}" for key, value in flatten(outer).items()]
    assert apply_overrides(Outer(), texts) == outer


def test_whole_numbers_of_json_pass_as_floats() -> None:
    values = to_dict(Outer())
    values["inner"]["rate"] = 2
    rate = from_dict(Outer, values).inner.rate
    assert rate == 2.0 and isinstance(rate, float)


def test_stored_configurations_are_read_strictly() -> None:
    values = to_dict(TrainConfig())
    for change, message in (
        ({"stpes": 3}, "configuration TrainConfig: unknown stpes; was it"),
        ({"mhc": {**values["mhc"], "streams": 3}}, "configuration mhc: unknown mhc.streams; was"),
        ({"mhc": 4}, "mhc=4 is not a section"),
        ({"steps": True}, "steps=True is not an integer"),
        ({"steps": 2.0}, "steps=2.0 is not an integer"),
        ({"dtype": "fp8"}, "dtype='fp8' is not one of fp32, bf16, fp16"),
        ({"steps": None}, "steps=None is not an integer"),
    ):
        with pytest.raises(UserError) as caught:
            from_dict(TrainConfig, {**values, **change})
        assert str(caught.value).startswith(message)
    del values["parallel"]["tensor"]
    with pytest.raises(UserError, match=r"configuration parallel: missing parallel\.tensor"):
        from_dict(TrainConfig, values)


def test_every_field_of_the_training_configuration_can_be_overridden() -> None:
    config = TrainConfig()
    texts = [f"{key}={value}" for key, value in flatten(config).items()]
    assert apply_overrides(config, texts) == config
