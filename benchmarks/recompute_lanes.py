"""The stress of recompute_stress.py on the lanes of an overlap, with Megatron's layers.

The pair of overlap.py: a forward interleaved with a backward that rebuilds on the priority lane,
and then the backward of the other micro-batch. Lanes are held up now and then, so that whoever
does not wait for another reads what is not there yet. Compared with the same pair one after the
other and without recompute. The control forgets to say which lanes use what is rebuilt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from allocator_pressure import Thief
from overlap_pair import Pair, bits_of
from ranks import layouts
from recompute_stress import Run, steps_with_another_bit, watch
from te_blocks import STREAMS, Size, Stage, megatron_config
from virtual_ranks import hold_up

from mhc_megatron.config import MHCConfig
from mhc_megatron.megatron.chain import chain_of
from mhc_megatron.megatron.delayed_wgrad import QueuedWeightGrads, delay_weight_gradients
from mhc_megatron.megatron.phases import Lanes
from mhc_megatron.pipeline.phases import Lane, OverlapMode
from mhc_megatron.recompute import StreamRecompute

MODES: tuple[OverlapMode, ...] = ("post", "recompute", "all")
POLICIES = {
    "auto": MHCConfig(num_streams=STREAMS, recompute="auto"),
    "block(1)": MHCConfig(num_streams=STREAMS, recompute="block", recompute_block=1),
    "block(3)": MHCConfig(num_streams=STREAMS, recompute="block", recompute_block=3),
    "stage": MHCConfig(num_streams=STREAMS, recompute="stage"),
}
CONTROLS = 80


class LateThief(Thief):
    """Holds up, on a GPU, one of the streams or the current one, now and then.

    Of a late stream, what others do not wait for is missing; and what is freed before it was read
    there has other bits by then.
    """

    def observe(self, function: Callable[..., Any], *operands: Any, **settings: Any) -> Any:
        """As in ``Thief``."""
        if self.active and torch.cuda.is_available():
            with torch.cuda.stream(self._random.choice(self._streams)):
                hold_up(self._random, on_gpu=True)
        return super().observe(function, *operands, **settings)


class ForgetfulLanes(Lanes):
    """Lanes that do not say who uses the states."""

    @property
    def of_states(self) -> tuple[Any, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class LaneStage:
    """A stage of Megatron's layers, and the lanes of its overlap."""

    stage: Stage
    lanes: Lanes
    thief: Thief

    def case(self, mode: OverlapMode, mhc: MHCConfig | None) -> Callable[[], Run]:
        """What makes the pair of a mode and policy, whose run returns output and gradients."""

        def make() -> Run:
            # What a run that ended in the middle left.
            self.lanes.join()
            QueuedWeightGrads(self.stage.chunk).take()()
            chain = chain_of(self.stage.chunk)
            assert chain is not None
            chain.recompute = None
            if mhc is not None:
                chain.recompute = StreamRecompute(mhc, num_sublayers=2 * len(chain.layers))
                chain.recompute.observer = self.thief.observe
            pair = Pair(self.stage, mode, self.lanes)
            return lambda: bits_of(self.stage, pair)

        return make


def lanes_line(size: Size, steps: int, *, engine: bool) -> dict[str, Any]:
    """Steps of interleaved pairs that differ in any bit from the pair without recompute and lanes.

    Args:
        size: of the stage; of at least two blocks.
        steps: in all modes and policies together.
        engine: Transformer Engine's modules.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = megatron_config(size, None, engine=engine)
    if engine:
        delay_weight_gradients(config)
    stage = Stage(size, config, POLICIES["auto"], None)
    layouts.randomise([stage.chunk], seed=1)
    lanes = Lanes(device)
    streams: list[Any] = [None]
    if device.type == "cuda":
        of_lanes = (lanes.stream(Lane.COMPUTE), lanes.stream(Lane.PRIORITY))
        streams += [*of_lanes, torch.cuda.Stream()]
    thief = LateThief(device, streams)
    on = LaneStage(stage, lanes, thief)
    expected = on.case("none", None)()()
    watch(stage.chunk, thief)
    cases = {
        f"{mode} {name}": on.case(mode, mhc) for mode in MODES for name, mhc in POLICIES.items()
    }
    figures = steps_with_another_bit(cases, expected, thief, steps)
    if device.type == "cuda":
        forgetful = LaneStage(stage, ForgetfulLanes(device), thief)
        control = {f"all {name}": forgetful.case("all", mhc) for name, mhc in POLICIES.items()}
        found = steps_with_another_bit(control, expected, thief, CONTROLS)
        figures["control"] = {"steps": CONTROLS, "mismatches": found["value"]}
    return {
        "benchmark": "recompute_memory",
        "impl": "mhc_megatron.all_policies on lanes",
        "shape": {
            "model": size.name,
            "T": size.tokens * size.sequences,
            "C": size.channels,
            "n": STREAMS,
            "L": 2 * size.blocks,
        },
        **figures,
    }
