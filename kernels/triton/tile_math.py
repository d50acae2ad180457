"""Device functions on tiles of streams: loads, mixes and products, unrolled over the n streams.

Streams are tuples of n [BT, BC] tiles, not one [BT, n, BC] block: a sum over streams is then plain
arithmetic in registers, in the layout that the loads chose.
"""

import triton
import triton.language as tl

# Channels of a stream that stay side by side where streams are interleaved: 16 bytes of bfloat16,
# what a thread loads, and a thread's part of a row in a product's result.
GROUP: tl.constexpr = tl.constexpr(8)


@triton.jit
def token_rows(T, BT: tl.constexpr, SPLITS: tl.constexpr = 1):
    """The program's first token, int64; indices of its tokens; which of them exist.

    The first goes into a scalar pointer, so that offsets within a tile are 32-bit and shared.
    Neighbouring programs are the SPLITS of the same tokens' channels.
    """
    first = (tl.program_id(0) // SPLITS).to(tl.int64) * BT
    tokens = first + tl.arange(0, BT)
    return first, tokens, tokens < T


# Whether TRITON_INTERPRET was set when the kernels were defined: they then run on the CPU.
INTERPRETED: tl.constexpr = tl.constexpr(not isinstance(token_rows, triton.JITFunction))


@triton.jit
def load_radial(radial_ptr, tokens, live, T, SINGLE_PASS: tl.constexpr):
    """What the division by the RMS contributes, of ``mix_bwd``'s [2, T]."""
    radial = tl.load(radial_ptr + tokens, mask=live, other=0.0)
    if not SINGLE_PASS:
        radial += tl.load(radial_ptr + T + tokens, mask=live, other=0.0)
    return radial


@triton.jit
def span_of(C: tl.constexpr, SPAN: tl.constexpr):
    """The first of the program's channels, SPAN of C, and the one behind the last."""
    if SPAN >= C:
        start, stop = 0, C
    else:
        start = tl.program_id(0) % ((C + SPAN - 1) // SPAN) * SPAN
        stop = tl.minimum(start + SPAN, C)
    return start, stop


@triton.jit
def channel_mask(live, c, C: tl.constexpr, BC: tl.constexpr):
    """[BT, BC]; without a tail only the tokens can be missing."""
    if C % BC == 0:
        mask = live[:, None]
    else:
        mask = live[:, None] & (c + tl.arange(0, BC) < C)[None, :]
    return mask


@triton.jit
def load_coefficients(packed_ptr, first_row, tokens, live, T, ROWS: tl.constexpr):
    """ROWS rows of [rows, T] as a tuple of [BT]."""
    rows = ()
    for row in tl.static_range(ROWS):
        rows = rows + (tl.load(packed_ptr + (first_row + row) * T + tokens, mask=live, other=0.0),)
    return rows


@triton.jit
def phi_pointers(
    weight_ptr, rows, columns, M: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Of [parts * M, K], or TRANSPOSED [K, 2 M], where a chunk of channels is one piece."""
    if TRANSPOSED:
        pointers = weight_ptr + columns * (2 * M) + rows
    else:
        pointers = weight_ptr + columns + rows * K
    return pointers


@triton.jit
def load_streams(
    row_ptrs, c, mask, N: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, EVICTION: tl.constexpr
):
    """n [BT, BC] tiles in float32; ``row_ptrs`` [BT, 1] points at each token's first number.

    EVICTION "evict_first" leaves L2 to what will be read again, "evict_last" asks to stay there,
    "" does neither.
    """
    streams = ()
    for i in tl.static_range(N):
        pointers = row_ptrs + (i * C + c + tl.arange(0, BC))[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0, eviction_policy=EVICTION)
        streams = streams + (widened(tile),)
    return streams


@triton.jit
def load_branch(
    row_ptrs, bias_ptr, c, mask, HAS_BIAS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr
):
    """The branch's output with its bias, [BT, BC] in float32."""
    columns = c + tl.arange(0, BC)
    branch = tl.load(row_ptrs + columns[None, :], mask=mask, other=0.0)
    return with_bias(branch, bias_ptr, columns, HAS_BIAS, C)


@triton.jit
def with_bias(branch, bias_ptr, columns, HAS_BIAS: tl.constexpr, C: tl.constexpr):
    """A tile of the branch's output, with its bias in float32."""
    branch = widened(branch)
    if HAS_BIAS:
        branch += tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    return branch


@triton.jit
def post_mix_stream(streams, branch, post, res, o: tl.constexpr, N: tl.constexpr):
    """``sum_i res[o, i] x[i] + post[o] f``, stream o of the next state before rounding.

    As in ``pre_mix``, every product but the first is in a fused multiply-add by name: left to the
    compiler, it may fuse another product of the first sum in another kernel, and a state that
    ``rebuild_fwd`` writes has other bits than the one that ``mix_fwd`` wrote.
    """
    mixed = post[o][:, None] * branch
    for i in tl.static_range(N):
        mixed = tl.fma(res[o * N + i][:, None], streams[i], mixed)
    return mixed


@triton.jit
def pre_mix(streams, read, N: tl.constexpr):
    """``sum_i read[i] x[i]``, the branch's input before rounding."""
    mixed = read[0][:, None] * streams[0]
    for i in tl.static_range(1, N):
        mixed = tl.fma(read[i][:, None], streams[i], mixed)
    return mixed


@triton.jit
def load_weight(row_ptrs, columns, column_mask, row_mask):
    """[rows, columns] of phi."""
    mask = row_mask[:, None] & column_mask[None, :]
    return tl.load(row_ptrs + columns[None, :], mask=mask, other=0.0)


@triton.jit
def rounded(tile, dtype: tl.constexpr):
    """A float32 tile in ``dtype``; to bfloat16 two numbers at a time.

    The compiler pairs conversions where pairs are stored and nothing else is done with them; else
    it converts number by number, which takes four times as long. The interpreter takes no assembly.
    """
    if not INTERPRETED and dtype == tl.bfloat16:
        tile = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [tile], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        tile = tile.to(dtype)
    return tile


@triton.jit
def widened(tile):
    """A tile in float32; from bfloat16 two numbers at a time.

    The compiler takes two instructions for the upper of two numbers in a register, which need only
    be freed of the lower one. ``pre_bwd`` and ``wide_pre_bwd`` are not faster for it, or slower.
    """
    if not INTERPRETED and tile.dtype == tl.bfloat16:
        tile = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=f,=f,r",
            [tile],
            tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def in_two_parts(tile):
    """A float32 tile as bfloat16 high and low parts; their sum has 16 bits of mantissa."""
    high = tile.to(tl.bfloat16)
    return high, (tile - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def interleaved_place(stream, channels, N: tl.constexpr):
    """Where a stream's channels are among all n * C for ``separate``."""
    return channels // GROUP * (N * GROUP) + stream * GROUP + channels % GROUP


@triton.jit
def side_by_side(streams, N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """n [BT, BC] tiles as [BT, n * BC], one stream after the other; n is 1, 2 or 4.

    A thread then writes its 16 bytes of a product's factor to other banks of shared memory than its
    neighbours. With the streams in turn, as ``separate`` takes them apart, four write to one.
    """
    # The last join is the fastest index.
    if N == 1:
        joined = streams[0]
    elif N == 2:
        joined = tl.permute(tl.join(streams[0], streams[1]), [0, 2, 1])
    else:
        joined = tl.join(tl.join(streams[0], streams[2]), tl.join(streams[1], streams[3]))
        joined = tl.permute(joined, [0, 2, 3, 1])
    return tl.reshape(joined, [BT, N * BC])


@triton.jit
def by_channel(joined, BITS: tl.constexpr, ORDER: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """[BT, BC, 2, ...], the bits of a stream's number last."""
    grouped = tl.reshape(joined, [BT, BC // GROUP] + BITS + [GROUP])
    return tl.reshape(tl.permute(grouped, ORDER), [BT, BC] + BITS)


@triton.jit
def separate(joined, N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """n tiles [BT, BC] of [BT, n * BC], GROUP channels of every stream and then the next ones.

    n is 1, 2 or 4.
    """
    if N == 1:
        streams = (joined,)
    elif N == 2:
        streams = tl.split(by_channel(joined, [2], [0, 1, 3, 2], BT, BC))
    else:
        even, odd = tl.split(by_channel(joined, [2, 2], [0, 1, 4, 2, 3], BT, BC))
        zero, two = tl.split(even)
        one, three = tl.split(odd)
        streams = (zero, one, two, three)
    return streams


@triton.jit
def dot(left, right, accumulator, PRECISION: tl.constexpr):
    """``accumulator + left @ right``.

    The interpreter multiplies bfloat16 operands as integers; there they are widened first, which
    changes no product.
    """
    if INTERPRETED:
        product = tl.dot(left.to(tl.float32), right.to(tl.float32), accumulator)
    else:
        product = tl.dot(left, right, accumulator, input_precision=PRECISION)
    return product


@triton.jit
def lane_sums(product, BT: tl.constexpr, BC: tl.constexpr, VECTOR: tl.constexpr):
    """Sums over the VECTOR neighbouring channels that one thread holds: [BT, BC / VECTOR].

    No thread needs another's numbers until the loop over the channels is done.
    """
    return tl.sum(tl.reshape(product, [BT, BC // VECTOR, VECTOR]), axis=2)


@triton.jit
def scaled_half(tile):
    """A float32 tile in float16, and by what its rows have to be multiplied: 11 bits of every
    number that is not far below the largest of its row."""
    # Of a row that vanishes, or nearly, what it is divided by does not.
    peak = tl.maximum(tl.max(tl.abs(tile), axis=1), 1e-30)
    return (tile * (16384.0 / peak)[:, None]).to(tl.float16), peak * (1.0 / 16384.0)


@triton.jit
def as_half(pointer):
    """A pointer to 16-bit numbers as one to float16."""
    return pointer.to(tl.pointer_type(tl.float16), bitcast=True)


@triton.jit
def zero_sums(ROWS: tl.constexpr, BT: tl.constexpr, WIDTH: tl.constexpr):
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([BT, WIDTH], tl.float32),)
    return sums
