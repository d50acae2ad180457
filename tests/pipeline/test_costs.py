"""Cost files, and the bytes of a stage."""

import dataclasses

import pytest

from mhc_megatron.pipeline.costs import Costs, StageCosts, costs_from_json
from mhc_megatron.pipeline.errors import ScheduleError
from mhc_megatron.pipeline.memory import StageSize

_FIELDS = "default, stages, latency, message_bytes, bandwidth, unit"


def test_messages_in_fp8_are_bytes_and_their_scales() -> None:
    size = StageSize(hidden=64, seq=10, micro_batch_size=3, streams=4, fp8_messages=True)
    assert size.message_bytes == 10 * 3 * (256 + 2)
    assert size.held_bytes == dataclasses.replace(size, fp8_messages=False).held_bytes
    with pytest.raises(ScheduleError, match=r"shape \(10, 3, 40\) is not made of blocks of 128"):
        dataclasses.replace(size, hidden=10)


def test_costs_from_json() -> None:
    text = """{"unit": "ms", "latency": 0.5, "default": {"forward": 2, "dgrad": 3, "wgrad": 1},
               "stages": {"0": {"forward": 4}, "-1": {"backward": 9}}}"""
    costs = costs_from_json(text, Costs(message_bytes=8, default=StageCosts(held_bytes=5)))
    stages = costs.of_stages(3)
    assert [stage.forward for stage in stages] == [4, 2, 2]
    assert [stage.whole_backward for stage in stages] == [4, 4, 9]
    assert {stage.held_bytes for stage in stages} == {5}
    assert (costs.unit, costs.latency, costs.message_bytes) == ("ms", 0.5, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[1]", f"the file: [1] is not an object with {_FIELDS}"),
        ('{"forward": 1}', f"the file: unknown field 'forward'; known: {_FIELDS}"),
        ('{"latncy": 1}', "the file: unknown field 'latncy'; did you mean 'latency'? "
         f"known: {_FIELDS}"),
        ('{"latency": 1, "latency": 1}', "latency is given twice; keep one of them"),
        ('{"stages": {"0": {"forward": 1, "dgrad": 2, "forward": 3}}}',
         "stages.0.forward is given twice; keep one of them"),
        ('{"stages": {"1": {}, "1": {}}}', "stages.1 is given twice; keep one of them"),
        ('{"stages": {"1": {}, "01": {}}}', "stages: '1' and '01' are one stage; keep one"),
        ('{"latency": -1}', "latency=-1 must be at least 0; write a measured value"),
        ('{"latency": "1"}', 'latency="1" is not a number; write one such as 2.5, or leave it '
         "out"),
        ('{"latency": NaN}', "latency=NaN must be at least 0; write a measured value"),
        ('{"bandwidth": 0}', "bandwidth=0 must be above 0; leave it out for no limit"),
        ('{"latency": null}', "latency=null is not a number; write one such as 2.5, or leave it "
         "out"),
        (f'{{"latency": {"9" * 5000}}}', "latency=Infinity is above 1e+12; change the unit"),
        ('{"latency": Infinity}', "latency=Infinity is above 1e+12; change the unit"),
        ('{"bandwidth": Infinity}', "bandwidth=Infinity is above 1e+18; change the unit"),
        ('{"bandwidth": 1e-9, "message_bytes": 8192}', "a message of message_bytes=8192 at "
         "bandwidth=1e-09 takes more than 1e+12; bandwidth is in bytes per unit of time"),
        ('{"message_bytes": 1.5}', "message_bytes=1.5 is not a whole number; write one such as "
         "4096, or leave it out"),
        ('{"default": {"held_bytes": 1000000000001}}',
         "default.held_bytes=1000000000001 is above 1e+12; give the bytes of one micro-batch"),
        ('{"default": {"overlap": 0}}', "default.overlap=0 must be above 0; leave it out for the "
         "forward and the backward one after the other"),
        ('{"stages": {"-1": {"backward": 0.0}}}', "stages.-1.backward=0.0 must be above 0; leave "
         "it out for dgrad + wgrad"),
        ('{"default": {"forward": 0}}', "default.forward=0 must be above 0; write the time that "
         "it takes"),
        ('{"default": {"dgrad": -2}}', "default.dgrad=-2 must be above 0; write a measured value"),
        ('{"unit": "h"}', "unit='h' is not one of us, ms, s, or empty"),
        ('{"default": {"wgrad": true}}', "default.wgrad=true is not a number; write one such as "
         "2.5, or leave it out"),
        ('{"stages": {"x": {}}}', "stages: 'x' is not a stage number; write an object such as "
         '{"0": {"forward": 2}, "-1": {"forward": 3}}'),
        ('{"stages": [1]}', 'stages: [1] is not an object such as {"0": {...}}'),
        ('{"default": {"held_bytes": 1, "wgrad_bytes": 2}}',
         "default: wgrad_bytes=2 is a part of held_bytes=1 and cannot be larger"),
        ('{"default": {"rebuilt_bytes": 3, "wgrad_rebuilt_bytes": 4}}',
         "default: wgrad_rebuilt_bytes=4 is a part of split_rebuilt_bytes=3 and cannot be larger"),
    ],
)  # fmt: skip
def test_wrong_costs(text: str, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        costs_from_json(text)
    assert str(caught.value) == message


def test_what_takes_no_time_is_fine_where_it_can_be_none() -> None:
    text = '{"latency": 0, "default": {"wgrad": 0, "recompute": 0, "held_bytes": 0}}'
    assert costs_from_json(text) == Costs(default=StageCosts(wgrad=0))


def test_costs_for_stages_that_are_not_there() -> None:
    for stage in (2, -3):
        with pytest.raises(ScheduleError) as caught:
            Costs(stages={stage: StageCosts()}).of_stages(2)
        assert str(caught.value) == (
            f"costs for stage {stage}, but the schedule has 2 stages; "
            "name 0 to 1, or -1 for the last"
        )
    with pytest.raises(
        ScheduleError, match="costs for stage 1 are given twice, also as -1; keep one"
    ):
        Costs(stages={1: StageCosts(), -1: StageCosts()}).of_stages(2)


@pytest.mark.parametrize(
    ("num_sublayers", "block", "kept"),
    [(24, 4, 48), (36, 4, 60), (60, 6, 76), (86, 8, 92), (122, 9, 110)],
)
def test_the_recompute_block_with_the_lowest_peak(
    num_sublayers: int, block: int, kept: int
) -> None:
    """mHC, arXiv 2512.24880, Eq. 20 in whole numbers; the branches' own activations left out."""
    size = StageSize(
        hidden=1, seq=1, num_layers=num_sublayers // 2, branch_width=0, element_bytes=1
    )
    assert size.block == block
    assert size.kept_bytes + size.rebuilt_bytes == kept


def test_bytes_of_a_stage() -> None:
    size = StageSize(hidden=10, seq=100, micro_batch_size=2, num_layers=3, recompute_block=4)
    unit = 10 * 100 * 2 * 2
    rest = 6 * (4 * 200 * 50 + 2 * 2 * 24 * 40)  # coefficients, and phi in two parts
    assert size.held_bytes == unit * (6 * (1 + 6) + 4 * 2) + rest
    assert size.rebuilt_bytes == unit * (4 + 2) * 4
    assert size.split_rebuilt_bytes == unit * (4 * 4 + 2 * 6)
    assert size.wgrad_rebuilt_bytes == unit * 2 * 6
    assert size.costs(StageCosts(forward=7)) == StageCosts(
        forward=7,
        held_bytes=size.held_bytes,
        rebuilt_bytes=size.rebuilt_bytes,
        split_rebuilt_bytes=size.split_rebuilt_bytes,
        wgrad_rebuilt_bytes=size.wgrad_rebuilt_bytes,
    )
    assert size.message_bytes == unit * 4
    everything = StageSize(hidden=10, seq=100, micro_batch_size=2, num_layers=3, recompute_block=0)
    assert everything.held_bytes == unit * 6 * (1 + 6 + 4 + 2) + rest
    assert everything.rebuilt_bytes == everything.split_rebuilt_bytes == 0
    assert everything.wgrad_rebuilt_bytes == 0
    fewer = dataclasses.replace(everything, logits=8, phi_parts=0)
    assert fewer.held_bytes == unit * 6 * (1 + 6 + 4 + 2) + 6 * 4 * 200 * (24 + 8 + 2)
    for wrong, message in {
        "hidden": "hidden=0 must be at least 1",
        "recompute_block": "recompute_block=-1 must be at least 0",
    }.items():
        with pytest.raises(ScheduleError, match=message):
            StageSize(**{"hidden": 1, "seq": 1, wrong: int(message.split()[0].partition("=")[2])})
    with pytest.raises(ScheduleError, match="recompute_block=3 is above the 2 sublayers"):
        StageSize(hidden=1, seq=1, recompute_block=3)
