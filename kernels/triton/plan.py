"""What all calls of one kind have in common, found once: kernels, grids, sizes of buffers.

A call of ``pre``, ``post`` or ``post_pre`` with its backward launches up to seven kernels. Whatever
follows from sizes, dtypes and options alone is in its plan; a launch only adds addresses to it.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from mhc_megatron.kernels.options import NORM_EPS, MappingOptions
from mhc_megatron.kernels.triton import bound
from mhc_megatron.kernels.triton.arguments import INTERPRETED, blocks, matrices_of, parts_of
from mhc_megatron.kernels.triton.compiled import Part, Prepared, current_stream
from mhc_megatron.kernels.triton.tiles import Tile, Tiles, default_tiles

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
    n, channels = streams.shape[-2:]
    branch_dtype, bias_dtype, norm_dtype = (
        None if tensor is None else tensor.dtype for tensor in (branch, branch_bias, norm_weight)
    )
    return _plan(
        Call(
            num_tokens=streams.numel() // (n * channels),
            num_streams=n,
            channels=channels,
            dtype=streams.dtype,
            device=streams.device,
            operand_dtypes=(branch_dtype, bias_dtype, norm_dtype),
            options=options,
            tiles=tiles or default_tiles(n, channels, streams.dtype),
            single_pass=single_pass,
            accumulates=accumulates,
            norm_eps=float(norm_eps),
            flat=flat,
        )
    )


# As many as there may be numbers of tokens: each is a plan of its own.
@lru_cache(maxsize=1024)
def _plan(call: Call) -> "Plan":
    return Plan(call)


class Plan:
    """The launches of one ``Call`` and the sizes of what they write; each is made at first use.

    Attributes:
        num_tokens, num_streams, channels, num_logits: T, n, C, and M, 0 for ``post``.
        dtype, device: of the streams.
        call: what else the plan is of; ``accumulates``, ``single_pass`` of it.
        rows: of the mappings, n * (n + 2).
        wide: of more streams than the kernels take whose programs have all channels of a token.
        factor_dtype: of phi's parts and of the gradient of the logits.
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
        self._launched_by_triton = INTERPRETED or call.device.type == "meta"

    def shape_of_input(self, streams: Tensor) -> tuple[int, ...]:
        """Of the branch's input, [..., C]."""
        return (*streams.shape[: -1 if self.call.flat else -2], self.channels)

    def stream(self) -> int | None:
        """What ``Prepared`` launches on, of the current device: for the launches of one pass."""
        return None if self._launched_by_triton else current_stream(self.device)

    @cached_property
    def matrices(self) -> Tensor | None:
        """Of the permutations, where the mappings mix them."""
        return matrices_of(self._options, self.num_streams, self.device)

    @property
    def _options(self) -> MappingOptions:
        assert self.call.options is not None
        return self.call.options

    @cached_property
    def split_weight(self) -> Prepared:
        n, channels, rows = self.num_streams, self.channels, self.num_logits
        if self.wide:
            grid = (n * blocks(channels, bound.SPLIT_CHANNELS),)
            return Prepared(bound.split_wide(n, channels, rows), grid)
        kernel = bound.split_weight(n, channels, rows, self.dtype)
        return Prepared(kernel, (blocks(self.num_weights, bound.ELEMENTS),))

    @cached_property
    def shape_of_factors(self) -> tuple[int, ...]:
        """Of phi's parts: [2, M, K], of many streams [K, 2 M]."""
        width = self.num_streams * self.channels
        return (width, 2 * self.num_logits) if self.wide else (2, self.num_logits, width)

    @cached_property
    def post_fwd(self) -> Prepared:
        tile = self.call.tiles.post
        kernel = bound.post_fwd(self.num_streams, self.channels, tile, self.has_bias)
        grid = (blocks(self.num_tokens, tile.tokens), blocks(self.channels, tile.channels))
        return Prepared(kernel, grid, (self.num_tokens,))

    @cached_property
    def mix_fwd(self) -> Prepared:
        options, tile = self._options, self.call.tiles.mix
        kernel = bound.mix_fwd(
            self.num_streams,
            self.channels,
            self.num_logits,
            self.dtype,
            options,
            tile,
            self.has_branch,
            self.has_bias,
            self.single_pass,
            self.has_norm,
        )
        return Prepared(kernel, (blocks(self.num_tokens, tile.tokens),), self._numbers)

    @property
    def _numbers(self) -> tuple[float, ...]:
        """Of ``mix_fwd`` and ``read_fwd``."""
        norm_eps = self.call.norm_eps if self.has_norm else 0.0
        return self.num_tokens, self._options.rms_eps, self._options.eps, norm_eps

    @cached_property
    def project_fwd(self) -> Prepared:
        """Of many streams, with ``read_fwd`` in the place of ``mix_fwd``."""
        tile = self._project_tile
        kernel = bound.project_fwd(
            self.num_streams,
            self.channels,
            self.num_logits,
            self.dtype,
            tile,
            self.has_branch,
            self.has_bias,
            self.single_pass,
        )
        return Prepared(kernel, (self._programs(tile),), (self.num_tokens,))

    @cached_property
    def read_fwd(self) -> Prepared:
        tile = self.call.tiles.mix
        kernel = bound.read_fwd(
            self.num_streams,
            self.channels,
            self.num_logits,
            self._options,
            tile,
            self._project_tile,
            self.single_pass,
            self.has_norm,
        )
        return Prepared(kernel, (blocks(self.num_tokens, tile.tokens),), self._numbers)

    @property
    def _project_tile(self) -> Tile:
        assert self.call.tiles.project is not None
        return self.call.tiles.project

    @cached_property
    def project_sums(self) -> int:
        """float32 numbers that ``project_fwd`` leaves to ``read_fwd``."""
        tile = self._project_tile
        rows = bound.project_rows(self.num_streams, self.num_logits)
        return self._programs(tile) * rows * tile.tokens

    def _programs(self, tile: Tile) -> int:
        """Of a kernel whose programs share a token's channels."""
        return blocks(self.num_tokens, tile.tokens) * tile.splits(self.channels)

    @cached_property
    def mix_bwd(self) -> tuple[Prepared, Prepared]:
        """Without a gradient of the mappings, and with."""
        options, tile = self._options, self._mix_backward_tile()
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
                (self.mix_programs,),
                (self.num_tokens, options.eps),
                self._parts(
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
    def mix_programs(self) -> int:
        """Of ``mix_bwd``; each writes partial sums."""
        return blocks(self.num_tokens, self._mix_backward_tile().tokens)

    def _mix_backward_tile(self) -> Tile:
        tiles = self.call.tiles
        return (self.has_norm and tiles.mix_backward_norm) or tiles.mix_backward

    @cached_property
    def _layout(self) -> tuple[dict[str, Part], int]:
        """What the backward's kernels leave to each other, as parts of one buffer, and its size.

        projected: gradient of ``vec(x) phi``, [PARTS * M, T].
        radial: of the RMS, [T].
        history: the iterations' divisors.
        small_sums: of alphas and bias, [programs, 2 M].
        norm_sums: of a norm's weight, [programs, C].
        weight_sums: of phi, [splits, M, K].
        """
        rows = 2 * (self._options.iterations - 1) * self.num_streams if self.iterates else 0
        sizes = {
            "projected": self.parts * self.num_logits * self.num_tokens,
            "radial": self.num_tokens,
            "history": rows * self.num_tokens,
            "small_sums": 2 * self.num_logits * self.mix_programs,
            "norm_sums": self.mix_programs * self.channels if self.has_norm else 0,
            "weight_sums": self.splits * self.num_weights if self.has_weight_sums else 0,
        }
        parts, end = {}, 0
        for name, size in sizes.items():
            if size:
                dtype = self.factor_dtype if name == "projected" else torch.float32
                parts[name] = Part(end, size, dtype)
                end += blocks(size * dtype.itemsize, _ALIGNMENT) * _ALIGNMENT
        return parts, end // torch.float32.itemsize

    def _parts(self, **names: str) -> dict[str, Part]:
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
        return self._options.projection in ("sinkhorn", "sinkhorn_v4")

    @cached_property
    def streams_bwd(self) -> tuple[Prepared, Prepared]:
        """Without a gradient of the new streams, and with."""
        tile, read = self._streams_tile, {}
        if self.num_logits:
            read = self._parts(projected_ptr="projected", radial_ptr="radial")
        bind = bound.wide_streams_bwd if self.wide else bound.streams_bwd
        without, given = (
            Prepared(
                bind(
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
                (self._programs(tile),),
                (self.num_tokens,),
                read,
            )
            for has_grad_y in (False, True)
        )
        return without, given

    @property
    def _streams_tile(self) -> Tile:
        tiles = self.call.tiles
        return tiles.streams_backward if self.num_logits else tiles.post_backward

    @cached_property
    def streams_sums(self) -> int:
        """float32 numbers that ``wide_streams_bwd`` leaves to ``add_splits``."""
        return self._programs(self._streams_tile) * self.rows * self._streams_tile.tokens

    @cached_property
    def add_splits(self) -> Prepared:
        tile = self._streams_tile
        kernel = bound.add_splits(self.rows, tile, tile.splits(self.channels))
        grid = (blocks(self.num_tokens, bound.ELEMENTS), self.rows)
        return Prepared(kernel, grid, (self.num_tokens,))

    @cached_property
    def weight_bwd(self) -> Prepared:
        tile, split = self.call.tiles.weight_backward, self.call.tiles.weight_split
        width = self.num_streams * self.channels
        bind = bound.wide_weight_bwd if self.wide else bound.weight_bwd
        kernel = bind(width, self.num_logits, self.dtype, tile, split)
        grid = (blocks(width, tile.channels), self.splits)
        parts = self._parts(projected_ptr="projected", partial_ptr="weight_sums")
        return Prepared(kernel, grid, (self.num_tokens,), parts)

    @cached_property
    def pre_bwd(self) -> dict[tuple[bool, bool], Prepared]:
        """By whether a gradient passes through, and whether phi's is wanted."""
        tiles, n = self.call.tiles, self.num_streams
        tile, split = tiles.pre_backward, tiles.pre_split
        grid = blocks(self.channels, tile.channels) * n, blocks(self.num_tokens, split)
        return {
            (has_grad_y, trains): Prepared(
                bound.pre_bwd(
                    n,
                    self.channels,
                    self.num_logits,
                    self.dtype,
                    tile,
                    split,
                    tiles.product_terms,
                    has_grad_y,
                    trains,
                ),
                grid,
                (self.num_tokens,),
                self._parts(
                    projected_ptr="projected",
                    radial_ptr="radial",
                    **({"weight_partial_ptr": "weight_sums"} if trains else {}),
                ),
            )
            for has_grad_y in (False, True)
            for trains in (False, True)
        }

    @cached_property
    def num_weights(self) -> int:
        """Numbers of phi."""
        return self.num_logits * self.num_streams * self.channels

    @cached_property
    def splits(self) -> int:
        """Of the tokens, for phi's gradient."""
        tiles = self.call.tiles
        split = tiles.weight_split if self.has_branch else tiles.pre_split
        return blocks(self.num_tokens, split)

    @cached_property
    def has_weight_sums(self) -> bool:
        """Whether phi's gradient is a sum of sums, which ``reduce_partials`` adds up."""
        return self.splits > 1 or self.accumulates

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
        parts = self._parts(
            weight_partial_ptr="weight_sums",
            partial_ptr="small_sums",
            norm_partial_ptr="norm_sums",
        )
        return Prepared(kernel, (programs,), (self.mix_programs,), parts)

    @cached_property
    def small(self) -> tuple[int, ...]:
        """Numbers of the gradients of bias and alphas in one buffer, where the kernel has them:
        alphas side by side, from a multiple of 16 bytes on."""
        gap = -self.num_logits % 4
        return (self.num_logits, *([gap] if gap else []), 1, 1, 1)

    @cached_property
    def small_size(self) -> int:
        return sum(self.small)
