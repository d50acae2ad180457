"""Import this before megatron-core: its Transformer Engine may else find another cuDNN."""

from mhc_megatron.cudnn import load_torchs_cudnn

load_torchs_cudnn()
