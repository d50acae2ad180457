"""What one kind of call is, and the sizes of what its kernels write."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.triton import bound, hopper
from mhc_megatron.kernels.triton.arguments import INTERPRETED, logit_rows, matrices_of, parts_of
from mhc_megatron.kernels.triton.compiled import Part
from mhc_megatron.kernels.triton.tile_math import GROUP
from mhc_megatron.kernels.triton.tiles import Tile, Tiles, blocks

# Bytes; Triton compiles for pointers to multiples of 16, and CUDA's allocator has multiples of 512.
_ALIGNMENT = 512


@dataclass(frozen=True, kw_only=True)
class Call:
    """All that the launches of one call depend on, but the addresses of its tensors.

    Attributes:
        num_tokens, num_streams, channels, dtype, device: of the streams.
        operand_dtypes: of branch, branch_bias and norm_weight; None for each that there is not.
        options: of the mappings that are made; None for ``post``, which makes none.
        tiles: of the kernels.
        single_pass: the branch's input is read with the mappings that write.
        accumulates: phi's gradient is added to a buffer.
        norm_eps: of the norm of the branch's input, if it has a weight.
        flat: the streams are [..., n*C], not [..., n, C].
    """

    num_tokens: int
    num_streams: int
    channels: int
    dtype: torch.dtype
    device: torch.device
    operand_dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]
    options: MappingOptions | None
    tiles: Tiles
    single_pass: bool
    accumulates: bool
    norm_eps: float
    flat: bool


def shape_of_factors(num_streams: int, num_logits: int, channels: int) -> tuple[int, ...]:
    """Of phi's two parts for bfloat16 streams: [2, M, K], of many streams [K, 2 M]."""
    width = num_streams * channels
    if num_streams > bound.WIDE:
        return width, 2 * num_logits
    return 2, num_logits, width


class Buffers:
    """The sizes that follow from a ``Call``.

    Attributes:
        num_tokens, num_streams, channels, num_logits: T, n, C, and M, 0 for ``post``.
        dtype, device: of the streams.
        call: all of it; ``accumulates`` and ``single_pass`` are asked for at every call.
        rows: of the mappings, n * (n + 2).
        wide: of more streams than the kernels take whose programs have all channels of a token.
        parts: of phi, in which the kernels take it.
        factor_dtype: of them, and of the gradient of the logits.
    """

    def __init__(self, call: Call) -> None:
        n = call.num_streams
        self.call = call
        self.num_tokens, self.num_streams, self.channels = call.num_tokens, n, call.channels
        self.num_logits = 0 if call.options is None else call.options.num_logits(n)
        self.dtype, self.device = call.dtype, call.device
        self.accumulates = call.accumulates
        self.single_pass, self.rows, self.wide = call.single_pass, n * (n + 2), n > bound.WIDE
        self.parts = parts_of(call.dtype)
        self.factor_dtype = torch.bfloat16 if self.parts == 2 else torch.float32
        branch, bias, norm = call.operand_dtypes
        self.has_branch, self.has_bias = branch is not None, bias is not None
        self.has_norm = norm is not None

    def shape_of_input(self, streams: Tensor) -> tuple[int, ...]:
        """Of the branch's input, [..., C]."""
        return (*streams.shape[: -1 if self.call.flat else -2], self.channels)

    @cached_property
    def matrices(self) -> Tensor | None:
        """Of the permutations, where the mappings mix them."""
        return matrices_of(self.options, self.num_streams, self.device)

    @property
    def options(self) -> MappingOptions:
        assert self.call.options is not None
        return self.call.options

    @cached_property
    def num_weights(self) -> int:
        """Numbers of phi."""
        return self.num_logits * self.num_streams * self.channels

    @cached_property
    def shape_of_factors(self) -> tuple[int, ...]:
        """Of phi's parts."""
        return shape_of_factors(self.num_streams, self.num_logits, self.channels)

    @cached_property
    def chunk_width(self) -> int:
        """Channels of a chunk of phi's parts, as the forward of up to four streams takes them; 0
        where it takes them as the backward does."""
        if self.wide or not bound.interleaves(self.num_streams, self.dtype):
            return 0
        if self.mixes_on_hopper:
            return self.hopper_mix_tile.channels
        width = self.call.tiles.mix.channels
        if width < GROUP.value:
            raise ValueError(
                f"tiles.mix.channels: expected at least {GROUP.value} of {self.dtype} streams, "
                f"got {width}"
            )
        return width

    @cached_property
    def shape_of_chunks(self) -> tuple[int, ...]:
        """Of these chunks."""
        width = self.chunk_width
        rows = self.parts * logit_rows(self.num_logits, self.dtype)
        return blocks(self.channels, width), rows, self.num_streams * width

    def programs_of(self, tile: Tile, numbers: int) -> int:
        """Of a kernel whose programs may share so many numbers of a token."""
        return blocks(self.num_tokens, tile.tokens) * tile.splits(numbers)

    @cached_property
    def mixes_on_hopper(self) -> bool:
        """Whether ``hopper_mix_fwd`` and ``read_fwd`` take the place of ``mix_fwd``."""
        if self.call.tiles.hopper_mix is None or not self.num_logits or INTERPRETED or self.wide:
            return False
        return bound.interleaves(self.num_streams, self.dtype) and hopper.runs_on(self.device)

    @property
    def hopper_mix_tile(self) -> Tile:
        assert self.call.tiles.hopper_mix is not None
        return self.call.tiles.hopper_mix

    @cached_property
    def mix_sums(self) -> int:
        """float32 numbers that ``hopper_mix_fwd`` leaves to ``read_fwd``."""
        rows, tile = self.parts * self.num_logits + 1, self.hopper_mix_tile
        return self.programs_of(tile, self.channels) * rows * tile.tokens

    @property
    def read_tile(self) -> Tile:
        """Of ``read_fwd``."""
        tiles = self.call.tiles
        if self.mixes_on_hopper:
            assert tiles.hopper_read is not None
            return tiles.hopper_read
        return tiles.mix

    @property
    def project_tile(self) -> Tile:
        assert self.call.tiles.project is not None
        return self.call.tiles.project

    @cached_property
    def project_programs(self) -> int:
        """Of ``project_fwd``."""
        return self.programs_of(self.project_tile, self.num_streams * self.channels)

    @cached_property
    def project_sums(self) -> int:
        """float32 numbers that ``project_fwd`` leaves to ``read_fwd``."""
        rows = self.parts * self.num_logits
        return self.project_programs * rows * self.project_tile.tokens

    @property
    def streams_tile(self) -> Tile:
        """Of ``streams_bwd``."""
        tiles = self.call.tiles
        if not self.num_logits:
            return tiles.post_backward
        assert tiles.streams_backward is not None
        return tiles.streams_backward

    @cached_property
    def on_hopper(self) -> bool:
        """Whether ``hopper_pre_bwd`` takes the place of ``pre_bwd`` and ``wide_pre_bwd``.

        It copies tokens of the logits' gradient 16 bytes at a time, and counts its numbers in 32
        bits.
        """
        if self.call.tiles.hopper_pre_backward is None or not self.num_logits or INTERPRETED:
            return False
        if not bound.interleaves(self.num_streams, self.dtype) or not hopper.runs_on(self.device):
            return False
        few = self.parts * self.num_logits * self.num_tokens < 2**31
        return few and self.num_tokens % 16 == 0

    @cached_property
    def weight_on_hopper(self) -> bool:
        """Whether ``hopper_weight_bwd`` takes the place of ``weight_bwd``."""
        return self.call.tiles.hopper_weight is not None and self.has_branch and self.on_hopper

    @property
    def weight_tile(self) -> Tile:
        """Of one of the two."""
        tiles = self.call.tiles
        tile = tiles.hopper_weight if self.weight_on_hopper else tiles.weight_backward
        assert tile is not None
        return tile

    @property
    def weight_split(self) -> int:
        """Tokens of a program of one of the two."""
        tiles = self.call.tiles
        return tiles.hopper_weight_split if self.weight_on_hopper else tiles.weight_split

    @property
    def pre_backward_tile(self) -> Tile:
        """Of one of the three."""
        tiles = self.call.tiles
        if self.on_hopper:
            assert tiles.hopper_pre_backward is not None
            return tiles.hopper_pre_backward
        return tiles.pre_backward

    @property
    def pre_split(self) -> int:
        """Tokens of a program of one of the three."""
        tiles = self.call.tiles
        return tiles.hopper_pre_split if self.on_hopper else tiles.pre_split

    @cached_property
    def scale_width(self) -> int:
        """Channels of a token that ``wide_pre_bwd`` leaves with a scale, so that 16 bits hold more
        of a gradient than the streams' dtype does; 0 where there is none."""
        if self.wide and self.has_branch and self.num_logits > 0 and self.dtype.itemsize == 2:
            return self.pre_backward_tile.channels
        return 0

    @cached_property
    def splits(self) -> int:
        """Of the tokens, for phi's gradient."""
        split = self.weight_split if self.has_branch and not self.wide else self.pre_split
        return blocks(self.num_tokens, split)

    @cached_property
    def has_weight_sums(self) -> bool:
        """Whether phi's gradient is a sum of sums, which ``reduce_partials`` adds up."""
        return self.splits > 1 or self.accumulates

    def programs_that_read(self, tile: Tile) -> int:
        """Of ``read_fwd`` or ``mix_bwd``, in so large tiles: of streams. None in a single pass."""
        return 0 if self.single_pass else blocks(self.num_tokens, tile.tokens)

    def programs_that_iterate(self, tile: Tile) -> int:
        """Of these, the ones before, for H_post and H_res; no more than read, if any do."""
        return blocks(self.num_tokens, bound.later_tokens(self.num_streams, tile))

    @cached_property
    def read_programs(self) -> int:
        """Of ``mix_bwd``; each writes partial sums."""
        return self.programs_that_read(self.mix_backward_tile)

    @cached_property
    def later_programs(self) -> int:
        """Likewise."""
        return self.programs_that_iterate(self.mix_backward_tile)

    @property
    def sum_columns(self) -> int:
        """Of the partial sums of alphas and bias: a program's."""
        return self.read_programs or self.later_programs

    @property
    def mix_backward_tile(self) -> Tile:
        tiles = self.call.tiles
        return (self.has_norm and tiles.mix_backward_norm) or tiles.mix_backward

    @cached_property
    def _layout(self) -> tuple[dict[str, Part], int]:
        """What the backward's kernels leave to each other, as parts of one buffer, and its size.

        projected: gradient of ``vec(x) phi``, [PARTS * M, T].
        radial: of the RMS, [2, T].
        history: the iterations' divisors.
        small_sums: of alphas and bias, [2 M, programs].
        norm_sums: of a norm's weight, [programs, C].
        weight_sums: of phi, [splits, M, K].
        scales: of the gradient of the new streams, [n, C / scale_width, T].
        """
        rows = 2 * (self.options.iterations - 1) * self.num_streams if self.iterates else 0
        sizes = {
            "projected": self.parts * self.num_logits * self.num_tokens,
            "radial": 2 * self.num_tokens,
            "history": rows * self.num_tokens,
            "small_sums": 2 * self.num_logits * self.sum_columns,
            "norm_sums": self.read_programs * self.channels if self.has_norm else 0,
            "weight_sums": self.splits * self.num_weights if self.has_weight_sums else 0,
            "scales": self.num_scales * self.num_tokens,
        }
        dtypes = {"projected": self.factor_dtype}
        parts, end = {}, 0
        for name, size in sizes.items():
            if size:
                dtype = dtypes.get(name, torch.float32)
                parts[name] = Part(end, size, dtype)
                end += blocks(size * dtype.itemsize, _ALIGNMENT) * _ALIGNMENT
        return parts, end // torch.float32.itemsize

    @property
    def num_scales(self) -> int:
        """Of a token."""
        if not self.scale_width:
            return 0
        return self.num_streams * blocks(self.channels, self.scale_width)

    def parts_of_scratch(self, **names: str) -> dict[str, Part]:
        """Those that there are, by parameter."""
        parts, _ = self._layout
        return {parameter: parts[name] for parameter, name in names.items() if name in parts}

    @cached_property
    def scratch_size(self) -> int:
        """float32 numbers of what the backward's kernels leave to each other."""
        return self._layout[1]

    @cached_property
    def iterates(self) -> bool:
        """Whether the backward of the mappings keeps iterations."""
        return self.options.projection in ("sinkhorn", "sinkhorn_v4")

    @cached_property
    def small(self) -> tuple[int, ...]:
        """Numbers of the gradients of bias and alphas in one buffer, where the kernel has them:
        alphas side by side, from a multiple of 16 bytes on."""
        gap = -self.num_logits % 4
        return (self.num_logits, *([gap] if gap else []), 1, 1, 1)

    @cached_property
    def small_size(self) -> int:
        return sum(self.small)
