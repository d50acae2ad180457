"""The passes of a plan, replayed by a compiled extension of torch: what they cost the host is
launches. Optional; docs/install.md says how it is built."""

from mhc_megatron.kernels.native.extension import availability

__all__ = ["availability"]
