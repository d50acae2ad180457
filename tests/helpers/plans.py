"""Plans of an Overlap that no planner would make."""

import random
from collections.abc import Callable

from mhc_megatron.pipeline.phases import Phase, Plan, Step, check_plan


def random_plan(seed: int) -> Callable[..., Plan]:
    """Any valid plan without rebuilds, for ``LaneOverlap``; of one seed always the same."""

    def plan(forward: tuple[Phase, ...], backward: tuple[Phase, ...], *, rebuild: bool) -> Plan:
        assert not rebuild
        chance, steps = random.Random(seed), list[Step]()
        rows = [
            [Step("F", place) for place in range(len(forward))],
            [Step("B", place) for place in reversed(range(len(backward)))],
            list[Step](),
        ]
        while any(rows):
            row = chance.choice([row for row in rows if row])
            steps.append(row.pop(0))
            if steps[-1].op == "B" and chance.random() < 0.5:
                rows[2].append(Step("W", steps[-1].phase))
        check_plan(tuple(steps), forward, backward)
        return tuple(steps)

    return plan
