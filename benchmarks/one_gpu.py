"""A GPU for each of several processes."""

import os

import torch


def one_gpu(worker: int) -> dict[str, str]:
    """What a worker's environment has to say for it to see one of the GPUs that are seen here."""
    count = torch.cuda.device_count()
    if count < 2:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": seen[worker % count]}
