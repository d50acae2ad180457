"""What a good GPU reaches at least: a share of its data sheet, which no healthy one falls below."""

from typing import NamedTuple

# Healthy GPUs reach 0.6 to 0.9 of their data sheet. One that falls back to PCIe, or to half of its
# clock or its links, stays below this share.
_SHARE = 0.4


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
    return None if peaks is None else Floors(*(_SHARE * peak for peak in peaks))
