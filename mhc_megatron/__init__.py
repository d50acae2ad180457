"""Manifold-Constrained Hyper-Connections for released megatron-core."""
