"""The text form, there and back."""

import pytest
from helpers.schedules import schedules
from hypothesis import given, settings

from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.text import from_csv, to_csv
from mhc_megatron.pipeline.validate import validate


@given(schedules())
@settings(deadline=None, max_examples=100, derandomize=True)
def test_round_trip(schedule: Schedule) -> None:
    again = from_csv(to_csv(schedule), name=schedule.name)
    assert again.ranks == schedule.ranks
    assert from_csv(to_csv(schedule), schedule.placement).placement == schedule.placement
    validate(again)
    for stage in range(schedule.num_stages):
        for mb in range(schedule.num_mb):
            assert again.placement.rank_of(stage, mb) == schedule.placement.rank_of(stage, mb)


def test_idle_cells_and_communication_are_left_out() -> None:
    text = (
        "0UNSHARD,0F0,0SEND_F0,,0RECV_B0,0B0,0RESHARD,0REDUCE_GRAD\n"
        ", ,1RECV_F0, 1F0 ,1B0,1SEND_B0\n"
    )
    assert to_csv(from_csv(text)) == "0F0,0B0\n1F0,1B0\n"


def test_one_action_elsewhere_does_not_move_its_stage() -> None:
    schedule = from_csv("0F0,0F1,0B0,0B1,1B0\n1F0,1F1,1B1\n")
    assert schedule.placement.ranks == (0, 1)
    with pytest.raises(ScheduleError, match="csv: rank 0: 1B0 belongs on rank 1"):
        validate(schedule)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "line 1 has no actions; a line lists those of a rank, such as 0F0,0F1,0B0,0B1: delete "
            "it, or write some",
        ),
        (
            "\n0F0,0B0\n",
            "line 1 has no actions; a line lists those of a rank, such as 0F0,0F1,0B0,0B1: delete "
            "it, or write some",
        ),
        (
            "0F0,0B0\n,0SEND_F0\n1F0,1B0",
            "line 2 has no actions; a line lists those of a rank, such as 0F0,0F1,0B0,0B1: delete "
            "it, or write some",
        ),
        (
            "0F0,0B0\n1F0,1X0",
            "line 2, cell 2: '1X0' is not an action; write 2F0, 2B0, 2I0, 2W0, 2R0 (stage, "
            "operation, micro-batch) or (0F7;7B3)OVERLAP_F_B",
        ),
        (
            "(0F1;0I0)OVERLAP_F_B",
            "line 1, cell 1: '(0F1;0I0)OVERLAP_F_B' is not an action; write 2F0, 2B0, 2I0, 2W0, "
            "2R0 (stage, operation, micro-batch) or (0F7;7B3)OVERLAP_F_B",
        ),
        (
            "0F0,0BW0",
            "line 1, cell 2: '0BW0' is PyTorch's old notation; write B for BW, and I for the B "
            "that has a W",
        ),
        (
            "0F0,2F0",
            "stage 1 has no action, but stage 2 has; number from 0 without a gap",
        ),
        (
            "0F0,0F16777215",
            "micro-batch 1 has no action, but micro-batch 16777215 has; number from 0 without a "
            "gap",
        ),
        (
            "0F99999999",
            "line 1, cell 1: 0F99999999 is above the limits of 16777216 stages and 16777216 "
            "micro-batches; number both from 0",
        ),
        (
            f"0F{'9' * 5000}",
            f"line 1, cell 1: 0F{'9' * 5000} is above the limits of 16777216 stages and 16777216 "
            "micro-batches; number both from 0",
        ),
    ],
)
def test_wrong_text(text: str, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        from_csv(text)
    assert str(caught.value) == message
