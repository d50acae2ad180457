"""A rank that is killed during a step: do all processes end, in time, and is the action named?

GPT chunks with hyper-connections under ZB-H1, a stage per rank. In the second step the second rank
kills itself with SIGKILL in the forward of a micro-batch.
"""

import os
import re
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers.pool import process_context
from parity_cases import run_config
from ranks import layouts, start

from mhc_megatron.config import Backend
from mhc_megatron.launch.environment import World
from mhc_megatron.launch.port import reserved_port
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import build_chunks, transformer_config, wrap_data_parallel
from mhc_megatron.training.pipeline import forward_backward_func
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.step import run_step
from mhc_megatron.training.worker import leave

KILLED, MICRO_BATCH = 1, 3  # rank, and the micro-batch of whose forward it dies
# Seconds until a message that does not come is an error. The first step compiles kernels.
TIMEOUT = {"cpu": 8.0, "cuda": 30.0}["cuda" if torch.cuda.is_available() else "cpu"]
GRACE = 10.0  # seconds for a process to end after that
STARTING = 120.0  # until the steps
NAMED = re.compile(r"ExecutionError: (pipeline rank \d+ failed at (?:post|recv|send) .*)")


def dying(rank: int, config: TrainConfig, port: int, folder: str) -> None:
    """A process of its own: two steps, in the second of which one rank dies."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(f"{folder}/stderr{rank}", "w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    try:
        _steps(rank, config, folder)
    except Exception:
        traceback.print_exc()
        leave(1)
        raise


def _steps(rank: int, config: TrainConfig, folder: str) -> None:
    size = config.parallel.world_size
    start(rank, size)
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=size)):
        megatron_config = transformer_config(config)
        chunks = build_chunks(config, megatron_config, vocab_size=layouts.VOCAB)
        wrapped = wrap_data_parallel(config, megatron_config, chunks)
        forward_backward = forward_backward_func(config, megatron_config)
        run_step(config, forward_backward, wrapped, layouts.micro_batches(config, 0))
        if rank == KILLED:
            _die_in_forward(chunks[0], Path(folder))
        run_step(config, forward_backward, wrapped, layouts.micro_batches(config, 1))


def _die_in_forward(chunk: torch.nn.Module, folder: Path) -> None:
    forwards = 0

    def hook(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards > MICRO_BATCH:
            (folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    chunk.register_forward_pre_hook(hook)


def kill_lines(
    num_ranks: int, size: dict[str, int], backend: Backend, folder: Path, *, patience: float
) -> Iterator[dict[str, Any]]:
    """One result line, without provenance: seconds from the death to the last process's end."""
    folder.mkdir()
    config = run_config(size, backend, {"pipeline": num_ranks, "schedule": "zb_h1"})
    config = replace(config, timeout_minutes=TIMEOUT / 60)
    context = process_context(["multigpu_kill", "mhc_megatron.training.trainer"])
    with reserved_port() as port:
        processes = [
            context.Process(target=dying, args=(rank, config, port, str(folder)))
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        try:
            ended = _ends(processes, folder / "killed", STARTING * patience)
        finally:
            for process in processes:
                process.kill()
                process.join()
    statuses = [process.exitcode for process in processes]
    texts = [(folder / f"stderr{rank}").read_text() for rank in range(num_ranks)]
    named = [match[1] for text in texts if (match := NAMED.search(text))]
    neighbours = {KILLED - 1, KILLED + 1} & set(range(num_ranks))
    missing = [rank for rank in sorted(neighbours) if not NAMED.search(texts[rank])]
    killed = float((folder / "killed").read_text()) if (folder / "killed").exists() else None
    line: dict[str, Any] = {
        "impl": "mhc_megatron.zb_h1",
        "shape": {
            "T": config.model.seq_length,
            "C": config.model.hidden_size,
            "n": config.mhc.num_streams,
            "layers": config.model.num_layers,
            "ranks": num_ranks,
        },
        "metric": "kill",
        "value": max(ended) - killed if killed and all(ended) else STARTING + TIMEOUT + GRACE,
        "unit": "s",
        "timeout": TIMEOUT,
        "statuses": statuses,
        "named": named,
    }
    hung = [rank for rank, when in enumerate(ended) if when is None]
    line["problems"] = [
        *([] if killed else ["no rank was killed"]),
        *(f"rank {rank} did not end" for rank in hung),
        *(f"rank {rank} exited with 0" for rank, status in enumerate(statuses) if status == 0),
        *(f"rank {rank} named no action: {texts[rank][-2000:]}" for rank in missing),
    ]
    yield line


def _ends(processes: list[Any], killed: Path, starting: float) -> list[float | None]:
    """When each process ended by itself; None for one that did not."""
    ended: list[float | None] = [None] * len(processes)
    deadline = time.time() + starting
    died = False
    while None in ended and time.time() < deadline:
        for rank, process in enumerate(processes):
            if ended[rank] is None and not process.is_alive():
                ended[rank] = time.time()
        if not died and killed.exists():
            died, deadline = True, time.time() + TIMEOUT + GRACE
        time.sleep(0.05)
    return ended
