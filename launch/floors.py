"""What a good GPU reaches at least: shares of its data sheet that no healthy one falls below."""

from typing import NamedTuple

# One that falls back to less than half of its clock stays below the first; a node whose all-reduce
# goes over PCIe below the second. Neither is an estimate of what a good one reaches.
_OF_THE_MATMUL, _OF_THE_LINKS = 0.4, 0.2


class Floors(NamedTuple):
    """Lower limits of one kind of GPU.

    Attributes:
        matmul_tflops: of a large bf16 matrix product, TFLOP/s.
        node_bandwidth: of an all-reduce over GPUs of one node, bus bandwidth in GB/s.
    """

    matmul_tflops: float
    node_bandwidth: float


# By the name that CUDA gives: dense bf16 TFLOP/s, and GB/s of all NVLinks in one direction, as in
# NVIDIA's data sheets. Cards with PCIe or bridges have no one figure, and are not here.
_DATA_SHEETS = {
    "NVIDIA A100-SXM4-40GB": (312, 300),
    "NVIDIA A100-SXM4-80GB": (312, 300),
    "NVIDIA H100 80GB HBM3": (989, 450),
    "NVIDIA H200": (989, 450),
    "NVIDIA B200": (2250, 900),
}


def floors_of(gpu: str | None) -> Floors | None:
    """The floors of a GPU by CUDA's name of it; None if they are not known, or on a CPU."""
    peaks = _DATA_SHEETS.get(gpu or "")
    if peaks is None:
        return None
    return Floors(_OF_THE_MATMUL * peaks[0], _OF_THE_LINKS * peaks[1])
