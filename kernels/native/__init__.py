"""The passes of a plan, replayed by a compiled extension of torch: what they cost the host is
launches. Optional; README.md says how it is built."""

from mhc_megatron.kernels.native.programs import Programs, availability

__all__ = ["Programs", "availability"]
