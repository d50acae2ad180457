"""What all calls of one kind have in common, found once: kernels, grids, sizes of buffers.

A call of ``pre``, ``post`` or ``post_pre`` with its backward launches up to eight kernels. Whatever
follows from sizes, dtypes and options alone is in its plan; a launch only adds addresses to it.
"""

import itertools
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from mhc_megatron.kernels.options import NORM_EPS, MappingOptions
from mhc_megatron.kernels.triton import bound, hopper_bound
from mhc_megatron.kernels.triton.arguments import INTERPRETED, Shape
from mhc_megatron.kernels.triton.buffers import Buffers, Call
from mhc_megatron.kernels.triton.compiled import Prepared, current_stream
from mhc_megatron.kernels.triton.tiles import Tile, Tiles, blocks, default_tiles


def plan_of(
    streams: Tensor,
    branch: Tensor | None = None,
    branch_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *,
    options: MappingOptions | None = None,
    tiles: Tiles | None = None,
    single_pass: bool = False,
    accumulates: bool = False,
    norm_eps: float = NORM_EPS,
    flat: bool = False,
) -> "Plan":
    """The plan of a call with these operands: of ``pre`` without branch, of ``post`` without
    options.

    Args:
        streams: x, [..., n, C].
        branch, branch_bias, norm_weight: as for ``post_pre``; mappings and parameters are float32.
        options, tiles, single_pass, accumulates, norm_eps, flat: as of ``Call``; here the streams
            are [..., n, C] also if they are to be given as [..., n*C].
    """
    num_tokens, n, channels = Shape.of(streams)
    branch_dtype, bias_dtype, norm_dtype = (
        None if tensor is None else tensor.dtype for tensor in (branch, branch_bias, norm_weight)
    )
    return planned(
        Call(
            num_tokens=num_tokens,
            num_streams=n,
            channels=channels,
            dtype=streams.dtype,
            device=streams.device,
            operand_dtypes=(branch_dtype, bias_dtype, norm_dtype),
            options=options,
            tiles=tiles or default_tiles(n, num_tokens, channels, streams.dtype),
            single_pass=single_pass,
            accumulates=accumulates,
            norm_eps=float(norm_eps),
            flat=flat,
        )
    )


# As many as there may be numbers of tokens: each is a plan of its own.
@lru_cache(maxsize=1024)
def planned(call: Call) -> "Plan":
    """The plan of a call."""
    return Plan(call)


UNDECIDED = object()


class Plan(Buffers):
    """The launches of one ``Call``; each is made at first use.

    Attributes:
        programs: functions.py's, by which its passes are replayed; None where they are not.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.programs: Any = UNDECIDED
        self._launched_by_triton = INTERPRETED or call.device.type == "meta"

    def stream(self) -> int | None:
        """What ``Prepared`` launches on, of the current device: for the launches of one pass."""
        return None if self._launched_by_triton else current_stream(self.device)

    @cached_property
    def split_weight(self) -> Prepared:
        n, channels, rows = self.num_streams, self.channels, self.num_logits
        if self.wide:
            grid = (n * blocks(channels, bound.SPLIT_CHANNELS),)
            return Prepared(bound.split_wide(n, channels, rows), grid)
        kernel = bound.split_weight(n, channels, rows, self.dtype, self.chunk_width)
        return Prepared(kernel, (blocks(self.num_weights, bound.ELEMENTS),))

    @cached_property
    def post_fwd(self) -> Prepared:
        squares = self.wide and self.num_logits > 0
        tile = self._square_tile if squares else self.call.tiles.post
        sizes = self.num_streams, self.channels, self.num_logits, self.dtype
        kernel = bound.post_fwd(*sizes, tile, self.has_bias, self.single_pass, squares)
        numbers = self.num_tokens, self.options.rms_eps if squares else 0.0
        return Prepared(kernel, (self.programs_of(tile, self.channels),), numbers)

    @cached_property
    def square_fwd(self) -> Prepared:
        """Of many streams, in the place of ``post_fwd`` where nothing is written."""
        tile = self._square_tile
        if self.call.tiles.pre is not None:
            raise ValueError(
                f"tiles.pre: expected None, as of {self.num_streams} streams there are "
                f"tiles.project and tiles.mix, got {self.call.tiles.pre}"
            )
        sizes = self.num_streams, self.channels, self.num_logits, self.dtype
        kernel = bound.square_fwd(*sizes, tile)
        numbers = self.num_tokens, self.options.rms_eps
        return Prepared(kernel, (blocks(self.num_tokens, tile.tokens),), numbers)

    @property
    def _square_tile(self) -> Tile:
        """Of a kernel that makes 1/RMS of many streams."""
        tile = self.call.tiles.post
        if tile.splits(self.channels) > 1:
            raise ValueError(
                f"tiles.post.span: expected None, as 1/RMS of {self.num_streams} streams is of all "
                f"{self.channels} channels, got {tile.span}"
            )
        return tile

    @cached_property
    def mix_fwd(self) -> Prepared:
        tile = self._mix_tile
        kernel = bound.mix_fwd(
            self.num_streams,
            self.channels,
            self.num_logits,
            self.dtype,
            self.options,
            tile,
            self.has_branch,
            self.has_bias,
            self.single_pass,
            self.has_norm,
        )
        numbers = self.num_tokens, self.options.rms_eps, self.options.eps, self._norm_eps
        return Prepared(kernel, (blocks(self.num_tokens, tile.tokens),), numbers)

    @cached_property
    def hopper_mix_fwd(self) -> Prepared:
        tile = self.hopper_mix_tile
        kernel = hopper_bound.hopper_mix_fwd(
            self.num_streams,
            self.channels,
            self.num_logits,
            tile,
            self.has_branch,
            self.has_bias,
            self.single_pass,
        )
        return Prepared(kernel, (self.programs_of(tile, self.channels),), (self.num_tokens,))

    @property
    def _mix_tile(self) -> Tile:
        """Of ``mix_fwd``, with or without ``post``."""
        mix, pre = self.call.tiles.mix, self.call.tiles.pre
        if self.has_branch or pre is None:
            return mix
        if pre.channels != mix.channels:
            raise ValueError(
                f"tiles.pre.channels: expected {mix.channels}, as tiles.mix has and phi is laid "
                f"out for, got {pre.channels}"
            )
        return pre

    @property
    def _norm_eps(self) -> float:
        return self.call.norm_eps if self.has_norm else 0.0

    @cached_property
    def project_fwd(self) -> Prepared:
        """Of many streams, before ``read_fwd``."""
        kernel = bound.project_fwd(
            self.num_streams, self.channels, self.num_logits, self.dtype, self.project_tile
        )
        return Prepared(kernel, (self.project_programs,), (self.num_tokens,))

    @cached_property
    def read_fwd(self) -> Prepared:
        """Behind ``hopper_mix_fwd``, or of many streams ``post_fwd`` and ``project_fwd``."""
        tile = self.read_tile
        if self.mixes_on_hopper:
            before, shared = self.hopper_mix_tile, self.channels
        else:
            before, shared = self.project_tile, self.num_streams * self.channels
        kernel = bound.read_fwd(
            self.num_streams,
            self.channels,
            self.num_logits,
            self.dtype,
            self.options,
            tile,
            before.splits(shared),
            before.tokens,
            not self.single_pass,
            self.has_norm,
            self.mixes_on_hopper,
        )
        programs = self.programs_that_iterate(tile) + self.programs_that_read(tile)
        numbers = self.num_tokens, self.options.rms_eps, self.options.eps, self._norm_eps
        return Prepared(kernel, (programs,), numbers)

    @cached_property
    def mix_bwd(self) -> tuple[Prepared, Prepared]:
        """Without a gradient of the mappings, and with."""
        options, tile = self.options, self.mix_backward_tile
        without, given = (
            Prepared(
                bound.mix_bwd(
                    self.num_streams,
                    self.channels,
                    self.num_logits,
                    self.dtype,
                    options,
                    tile,
                    self.single_pass,
                    has_grad_packed,
                    self.has_norm,
                ),
                (self.later_programs + self.read_programs,),
                (self.num_tokens, options.eps),
                self.parts_of_scratch(
                    projected_ptr="projected",
                    radial_ptr="radial",
                    partial_ptr="small_sums",
                    history_ptr="history",
                    norm_partial_ptr="norm_sums",
                ),
            )
            for has_grad_packed in (False, True)
        )
        return without, given

    @cached_property
    def streams_bwd(self) -> tuple[Prepared, Prepared]:
        """Without a gradient of the new streams, and with."""
        tile, read = self.streams_tile, {}
        if self.num_logits:
            read = self.parts_of_scratch(projected_ptr="projected", radial_ptr="radial")
        without, given = (
            Prepared(
                bound.streams_bwd(
                    self.num_streams,
                    self.channels,
                    self.num_logits or 1,
                    self.dtype,
                    tile,
                    self.call.tiles.product_terms,
                    has_grad_y,
                    self.num_logits > 0,
                    self.has_bias,
                    self.single_pass,
                ),
                (blocks(self.num_tokens, tile.tokens),),
                (self.num_tokens,),
                read,
            )
            for has_grad_y in (False, True)
        )
        return without, given

    @cached_property
    def wide_streams_bwd(self) -> Prepared:
        """Of many streams; after ``wide_pre_bwd``, but for ``post`` alone."""
        tile = self.call.tiles.post_backward
        kernel = bound.wide_streams_bwd(
            self.num_streams,
            self.channels,
            self.dtype,
            tile,
            self.has_bias,
            self.scale_width,
            self.num_logits > 0 and self.single_pass,
        )
        parts = self.parts_of_scratch(scale_ptr="scales") if self.scale_width else {}
        grid = (blocks(self.num_tokens, tile.tokens),)
        return Prepared(kernel, grid, (self.num_tokens,), parts)

    @cached_property
    def weight_bwd(self) -> Prepared:
        tile, split = self.weight_tile, self.weight_split
        width = self.num_streams * self.channels
        if self.weight_on_hopper:
            kernel = hopper_bound.hopper_weight_bwd(width, self.num_logits, tile, split)
        else:
            kernel = bound.weight_bwd(width, self.num_logits, self.dtype, tile, split)
        grid = (blocks(width, tile.channels), self.splits)
        parts = self.parts_of_scratch(projected_ptr="projected", partial_ptr="weight_sums")
        return Prepared(kernel, grid, (self.num_tokens,), parts)

    @cached_property
    def pre_bwd(self) -> dict[tuple[bool, bool], Prepared]:
        """By whether a gradient passes through, and whether phi's is wanted."""
        tiles, n = self.call.tiles, self.num_streams
        tile, split = self.pre_backward_tile, self.pre_split
        # What stands in where an address is no multiple of 16 has the same programs.
        plain = replace(tiles.pre_backward, channels=tile.channels)
        grid = blocks(self.channels, tile.channels) * n, blocks(self.num_tokens, split)
        sizes = n, self.channels, self.num_logits
        how = split, tiles.product_terms
        parts = {"projected_ptr": "projected", "radial_ptr": "radial"}
        if self.scale_width:
            parts["scale_ptr"] = "scales"
        found = {}
        for has_grad_y, trains in itertools.product((False, True), repeat=2):
            modes = has_grad_y, trains
            wide_modes = *modes, self.scale_width > 0, self.wide and self.single_pass
            if self.wide:
                kernel = bound.wide_pre_bwd(*sizes, self.dtype, plain, *how, *wide_modes)
            else:
                kernel = bound.pre_bwd(*sizes, self.dtype, plain, *how, *modes)
            unaligned = None
            if self.on_hopper:
                unaligned = kernel
                kernel = hopper_bound.hopper_pre_bwd(*sizes, tile, *how, *wide_modes)
            sums = {"weight_partial_ptr": "weight_sums"} if trains else {}
            read = self.parts_of_scratch(**parts, **sums)
            found[has_grad_y, trains] = Prepared(
                kernel, grid, (self.num_tokens,), read, unaligned=unaligned
            )
        return found

    @cached_property
    def reduce_partials(self) -> Prepared:
        programs = self.num_logits + 3
        if self.has_norm:
            programs += blocks(self.channels, bound.NORM_COLUMNS)
        if self.has_weight_sums:
            programs += blocks(self.num_weights, bound.ELEMENTS)
        kernel = bound.reduce_partials(
            self.num_streams,
            self.channels,
            self.num_logits,
            self.splits,
            self.accumulates,
            self.has_norm,
        )
        parts = self.parts_of_scratch(
            weight_partial_ptr="weight_sums",
            partial_ptr="small_sums",
            norm_partial_ptr="norm_sums",
        )
        return Prepared(kernel, (programs,), (self.sum_columns, self.later_programs), parts)
