"""Layouts of tiles in Hopper's own kernels, and their copies to shared memory (Gluon).

A thread has two neighbouring columns of a product in eight. Where the columns of a factor are
``interchanged`` these are eight neighbouring channels: what is added to a product is then read, and
its result written, 16 bytes at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Its name up to Triton 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.constexpr_function
def loads(columns, warps):
    """16 bytes of a row of so many 16-bit numbers per thread."""
    across = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def shared(columns):
    """As tensor cores read rows of so many 16-bit numbers."""
    return gl.NVMMASharedLayout(min(128, 2 * columns), 16, 2)


@gluon.constexpr_function
def halves(columns):
    """Of tiles that no product takes: two rows of 32 columns are in banks of their own, which is
    what eight threads read in the layout ``ordered``."""
    return gl.SwizzledSharedLayout(32, 1, columns // 32, [1, 0])


@gluon.constexpr_function
def warps_down(rows, warps):
    """Of a product: warpgroups share its rows where there are 64 for each, else its columns."""
    return warps if rows >= 16 * warps else 4


@gluon.constexpr_function
def product(rows, columns, warps):
    """Of a product's result."""
    down = warps_down(rows, warps)
    return gl.NVMMADistributedLayout(
        [3, 0], [down, warps // down], [16, columns * down // warps, 16]
    )


@gluon.constexpr_function
def ordered(rows, columns, warps):
    """Of ``in_order``."""
    down = warps_down(rows, warps)
    width = columns * down // warps
    chunks = [[0, 32 << bit] for bit in range((width // 32).bit_length() - 1)]
    registers = [[0, 1], [0, 2], [0, 4], *chunks, [8, 0]]
    threads = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    places = [[16 << bit, 0] for bit in range(down.bit_length() - 1)]
    places += [[0, width << bit] for bit in range((warps // down).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, threads, places, [], [rows, columns])


@gluon.jit
def interchanged(tile):
    """Columns 8 g + 2 q + e of 32 as 8 q + 2 g + e: g counts eights, q pairs; its own inverse."""
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1]
    groups = gl.reshape(tile, [ROWS, COLUMNS // 32, 4, 4, 2])
    return gl.reshape(gl.permute(groups, [0, 1, 3, 2, 4]), [ROWS, COLUMNS])


@gluon.jit
def in_order(tile, LAYOUT: gl.constexpr):
    """A product with ``interchanged`` columns: eight neighbours are a thread's, and have been."""
    return gl.convert_layout(interchanged(tile), LAYOUT, assert_trivial=True)


@gluon.jit
def copy_states(
    place,
    base,
    stride: gl.constexpr,
    live,
    left,
    BT: gl.constexpr,
    BC: gl.constexpr,
    W: gl.constexpr,
):
    """[BT, BC] of the streams or of what has a stream's channels."""
    LAYOUT: gl.constexpr = loads(BC, W)
    tokens = gl.arange(0, BT, layout=gl.SliceLayout(1, LAYOUT))
    channels = gl.arange(0, BC, layout=gl.SliceLayout(0, LAYOUT))
    mask = (tokens < live)[:, None] & (channels < left)[None, :]
    async_copy.async_copy_global_to_shared(
        place, base + tokens[:, None] * stride + channels[None, :], mask=mask
    )
