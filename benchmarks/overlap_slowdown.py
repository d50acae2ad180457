"""How many times as long the work of each lane takes while another lane is kept busy.

Compute is forwards and backwards of the stage whose exchanges take no time; communication, an
exchange of a layer's tokens after another; priority, mHC's kernels around two branches in both
directions, and a rebuild. Each runs alone, then beside each other one, on the streams of a pair.
"""

import contextlib
import copy
import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from overlap_costs import clock_of
from overlap_exchange import Wait, exchange
from overlap_pair import GraphedPair, Pair
from te_blocks import Stage

from mhc_megatron import kernels
from mhc_megatron.megatron.chain import LayerChain, chain_of
from mhc_megatron.megatron.phases import Lanes
from mhc_megatron.pipeline.lanes import Slowdowns
from mhc_megatron.pipeline.phases import Lane

_REPETITIONS = 3
_GATE = 10_000_000  # cycles, some milliseconds, in which the host enqueues what begins together
_PART = 0.6  # of a round of the compute lane: how long others run that are measured beside it
_MARGIN = 1.4  # how much longer than the measured lane the other one would run alone
_MOST = 100.0  # a factor: that lane as good as waits for the other


@dataclass(frozen=True)
class _Work:
    """What a lane does.

    Attributes:
        lane: whose stream is the current one during a call.
        call: does it once.
        calls: of one measurement.
        alone: milliseconds of a call.
    """

    lane: Lane
    call: Callable[[], object]
    calls: int = 1
    alone: float = 0.0


def measured_slowdowns(
    stage: Stage, lanes: Lanes, wait: Wait, device: torch.device, repetitions: int, launch: str
) -> Slowdowns:
    """The slowdowns of the lanes of a stage's pair; without experts there is no communication.

    A CPU has one lane for all: there the other's work comes before, and factors are noise.

    Args:
        stage: whose gradients are lost.
        lanes: of the pair.
        wait: of the stage's exchanges.
        device: of the stage.
        repetitions: of which the median counts; three are enough.
        launch: of the compute lane's work, as for the pair; the other lanes' is always a graph, so
            that one host is enough for all.
    """
    meter = _Meter(lanes, device, min(repetitions, _REPETITIONS))
    chain = chain_of(stage.chunk)
    assert chain is not None
    with wait.left_out():
        pair: Pair | GraphedPair = Pair(stage, "none", lanes)
        if launch == "graph":
            pair = GraphedPair(stage, pair)

    def compute() -> None:
        with wait.left_out():
            stage.forget()
            pair.first_forward()
            pair.step()
            pair.last_backward()

    calls = {Lane.PRIORITY: _mhc(stage, chain)}
    if any(layer.is_moe_layer for layer in chain.layers):
        calls[Lane.COMMUNICATION] = _exchange(stage, chain, wait)
    works = [meter.alone(_Work(Lane.COMPUTE, compute))]
    for lane, call in calls.items():
        work = meter.alone(_Work(lane, meter.captured(lane, call)))
        many = max(int(_PART * works[0].alone / work.alone), 1)
        works.append(meter.alone(replace(work, calls=many)))
    factors = {
        (work.lane, other.lane): meter.factor(work, other)
        for work, other in itertools.permutations(works, 2)
    }
    stage.forget()
    return Slowdowns(factors)


def slowdowns_json(slowdowns: Slowdowns) -> dict[str, dict[str, float]]:
    """As in a file of phase costs."""
    found: dict[str, dict[str, float]] = {}
    for (lane, other), factor in slowdowns.factors.items():
        found.setdefault(lane.value, {})[other.value] = round(factor, 4)
    return found


def _exchange(stage: Stage, chain: LayerChain, wait: Wait) -> Callable[[], object]:
    config = chain.layers[0].config
    tokens = stage.x.shape[:-1].numel() * config.moe_router_topk
    sent = torch.zeros(tokens, config.hidden_size, dtype=stage.x.dtype, device=stage.x.device)
    return lambda: exchange(sent, wait)


def _mhc(stage: Stage, chain: LayerChain) -> Callable[[], object]:
    # Copies: the stage's own parameters are in use on the compute lane.
    mlp = copy.deepcopy(chain.layers[0].mlp_hyper_connection)
    attention = copy.deepcopy(chain.layers[-1].self_attention_hyper_connection)
    streams = stage.x.detach().clone().requires_grad_()
    inputs = [streams, *mlp.parameters(), *attention.parameters()]
    state = streams.detach().unflatten(-1, (mlp.num_streams, -1))
    with torch.no_grad():
        branch, mix = mlp.pre(streams)
        _, _, next_mix = mlp.post_pre(streams, branch, mix, attention)
    rebuilt = kernels.Rebuilt([torch.empty_like(state)], [torch.empty_like(branch) for _ in "ab"])

    def call() -> None:
        output, mappings = mlp.pre(streams)
        between, output, mappings = mlp.post_pre(streams, output, mappings, attention)
        result = attention.post(between, output, mappings)
        torch.autograd.grad(result, inputs, stage.grad)
        kernels.rebuild(state, [branch], [mix, next_mix], out=rebuilt, backend=mlp.mhc.backend)

    return call


class _Meter:
    """Times of lanes' work, alone and beside each other."""

    def __init__(self, lanes: Lanes, device: torch.device, repetitions: int) -> None:
        self._lanes, self._repetitions = lanes, repetitions
        self._clock, self._between = clock_of(device)
        self._on_gpu = device.type == "cuda"

    def captured(self, lane: Lane, call: Callable[[], object]) -> Callable[[], object]:
        """As a graph of the lane's stream; the call itself on a CPU."""
        if not self._on_gpu:
            return call
        torch.cuda.synchronize()
        with self._on(lane):
            for _ in range(2):
                call()
        torch.cuda.synchronize()
        graph, stream = torch.cuda.CUDAGraph(), self._lanes.stream(lane)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
        return graph.replay

    def alone(self, work: _Work) -> _Work:
        """With its time, after once to warm up."""
        times = [self._time(work)[0] for _ in range(self._repetitions + 1)]
        return replace(work, alone=statistics.median(times[1:]) / work.calls)

    def factor(self, work: _Work, other: _Work) -> float:
        """Of ``work`` beside ``other``, from 1 to ``_MOST``.

        If the other ends first, the rest of the work runs as fast as alone, and does not count.
        """
        expected = work.calls * work.alone
        beside = replace(other, calls=math.ceil(_MARGIN * expected / other.alone))
        factors = []
        for _ in range(self._repetitions):
            time, rest = self._time(work, beside)
            both = time - rest
            factors.append(both / max(expected - rest, both / _MOST))
        return max(statistics.median(factors), 1.0)

    def _time(self, work: _Work, beside: _Work | None = None) -> tuple[float, float]:
        """Milliseconds of all calls, and of those how many after the end of what is beside."""
        both = [work] if beside is None else [beside, work]
        # The compute lane is enqueued last: launching it may wait for the GPU.
        both.sort(key=lambda each: each.lane is Lane.COMPUTE)
        marks: dict[Lane, tuple[Any, Any]] = {}
        before = self._clock()
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda._sleep(_GATE)
            self._lanes.fork()
        for each in both:
            with self._on(each.lane):
                start = self._clock()
                for _ in range(each.calls):
                    each.call()
                marks[each.lane] = start, self._clock()
        start, end = (self._between(before, mark) for mark in marks[work.lane])
        if beside is None or not self._on_gpu:
            return end - start, 0.0
        return end - start, max(end - self._between(before, marks[beside.lane][1]), 0.0)

    def _on(self, lane: Lane) -> contextlib.AbstractContextManager[Any]:
        stream = self._lanes.stream(lane)
        return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
