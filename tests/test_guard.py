"""What counts as a bad step, and options that do not fit together."""

import math
from typing import Any

import pytest

from mhc_megatron.errors import UserError
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.guard import GuardConfig, problem
from mhc_megatron.training.overrides import apply_overrides

SPIKES = GuardConfig(max_rollbacks=1, spike_factor=2.0, spike_window=3)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"loss": 5.0}, None),
        ({"loss": math.nan}, "loss is nan"),
        ({"loss": math.inf, "grad_norm": math.nan}, "loss is inf"),
        ({"loss": 5.0, "grad_norm": math.inf}, "gradient norm is inf"),
        ({"loss": 5.0, "grad_norm": None}, None),
        # The limit is 2 x 2; the oldest loss is outside the window, a full one is needed.
        ({"loss": 4.0, "before": [90.0, 1.0, 2.0, 3.0]}, None),
        (
            {"loss": 4.1, "before": [90.0, 1.0, 2.0, 3.0]},
            "loss 4.1000 is above 2 x 2.0000, the median of 3 steps",
        ),
        ({"loss": 90.0, "before": [1.0, 2.0]}, None),
    ],
)
def test_what_is_bad(values: dict[str, Any], found: str | None) -> None:
    assert problem(SPIKES, **{"grad_norm": 1.0, "before": [], **values}) == found


def test_without_a_factor_no_loss_is_too_large() -> None:
    guard = GuardConfig(max_rollbacks=1, spike_window=1)
    assert problem(guard, loss=1e9, grad_norm=1.0, before=[1.0]) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["guard.max_rollbacks=-1"], "guard.max_rollbacks=-1 must be at least 0"),
        (["guard.spike_window=0"], "guard.spike_window=0 must be at least 1"),
        (["guard.spike_factor=1"], "guard.spike_factor=1.0 must be above 1"),
        (
            ["guard.spike_factor=3"],
            "guard.spike_factor=3.0 has no effect with guard.max_rollbacks=0; set "
            "guard.max_rollbacks too",
        ),
        (
            ["guard.max_rollbacks=2", "save_interval=0"],
            "guard.max_rollbacks=2 goes back to checkpoints, and save_interval=0 makes one at the "
            "end only; set save_interval",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        apply_overrides(TrainConfig(), overrides)
    assert str(refused.value) == message
