"""Blocks of e4m3 with a power of two each, in integers: the bits of ``kernels.fp8_blocks``.

Triton's own casts to float8 and of bfloat16 are others in the interpreter, which drops what is
below the normal numbers.
"""

import triton
import triton.language as tl


@triton.jit
def power_of_two(exponent):
    """float32, of int32 exponents from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def bits_of(value):
    """As int32 those of a number's float32."""
    if value.dtype == tl.bfloat16:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def rounded_to(bits, dtype: tl.constexpr):
    """The number of float32's ``bits`` in ``dtype``, to the nearest, ties to even."""
    if dtype == tl.bfloat16:
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        value = bits.to(tl.float32, bitcast=True).to(dtype)
    return value


@triton.jit
def e4m3_of(value, finite):
    """Codes of float32 numbers up to 448 in size, to the nearest, ties to even; else NaN's."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Exponent and three bits of mantissa, with e4m3's bias instead of float32's.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 in steps of 2^-9: added to 2^23, whose last bit is 1.
    steps = tl.abs(value) * 512.0 + 8388608.0
    subnormal = steps.to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.where(size < (127 - 6) << 23, subnormal, normal) | ((bits >> 24) & 0x80)
    return tl.where(finite, code, 0x7F)


@triton.jit
def pack_blocks(tensor_ptr, packed_ptr, R, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """R blocks: their codes [R, BLOCK], then their exponents plus 127 [R]."""
    R = tl.cast(R, tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < R
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    bits = bits_of(tl.load(tensor_ptr + places, mask=live[:, None], other=0.0))
    size = bits & 0x7FFFFFFF
    finite = size < 0x7F800000
    largest = tl.max(tl.where(finite, size, 0), axis=1)
    # 448 is 1.75 2^8.
    exponent = (largest >> 23) - 127 - 8 + tl.where((largest & 0x7FFFFF) > 0x600000, 1, 0)
    exponent = tl.maximum(exponent, -126)
    value = bits.to(tl.float32, bitcast=True) * power_of_two(-exponent)[:, None]
    code = e4m3_of(value, finite)
    tl.store(packed_ptr + places, code.to(tl.uint8), mask=live[:, None])
    tl.store(packed_ptr + R * BLOCK + rows, (exponent + 127).to(tl.uint8), mask=live)


@triton.jit
def unpack_blocks(packed_ptr, tensor_ptr, R, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The reverse; every number is exact in float32 and bfloat16."""
    R = tl.cast(R, tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < R
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    code = tl.load(packed_ptr + places, mask=live[:, None], other=0).to(tl.int32)
    exponent = tl.load(packed_ptr + R * BLOCK + rows, mask=live, other=127).to(tl.int32) - 127
    size = code & 0x7F
    normal = ((size << 20) + ((127 - 7) << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = value * power_of_two(exponent)[:, None]
    # A GPU's own NaN has all bits set, and would be rounded beyond them, to zero.
    bits = tl.where(size == 0x7F, 0x7FC00000, value.to(tl.int32, bitcast=True))
    bits = bits | ((code & 0x80) << 24)
    value = rounded_to(bits, tensor_ptr.dtype.element_ty)
    tl.store(tensor_ptr + places, value, mask=live[:, None])
