"""Device functions: residual logits to H_res and back, one token per lane.

Outside, matrices are blocks [BT, NN]: entry o * n + i, padded to a power of two. Inside, they are
tuples of n * n [BT] tensors: rows and columns are then summed by plain arithmetic between a lane's
own registers, where a block would pay shuffles between lanes, twice per iteration. Loops over the
iterations are run-time loops: unrolled, 20 of them take the compiler minutes.
"""

import triton
import triton.language as tl


@triton.jit
def halves(tile, WIDTH: tl.constexpr):
    """The even and the odd columns of [BT, WIDTH]; of two [BT] each."""
    if WIDTH > 2:
        tile = tl.reshape(tile, [tile.shape[0], WIDTH // 2, 2])
    return tl.split(tile)


@triton.jit
def alternate(evens, odds, WIDTH: tl.constexpr):
    """The inverse of ``halves``."""
    joined = tl.join(evens, odds)
    if WIDTH > 2:
        joined = tl.reshape(joined, [evens.shape[0], WIDTH])
    return joined


@triton.jit
def entries_of(block, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    """The first COUNT columns of [BT, 2^LEVELS], [BT] each."""
    if LEVELS == 0:
        tiles = (tl.reshape(block, [block.shape[0]]),)
    else:
        tiles = (block,)
    for level in tl.static_range(LEVELS):
        evens = ()
        odds = ()
        for k in tl.static_range(2**level):
            even, odd = halves(tiles[k], 2 ** (LEVELS - level))
            evens = evens + (even,)
            odds = odds + (odd,)
        # Tiles are in the order of their first columns, 2^level apart.
        tiles = evens + odds
    entries = ()
    for k in tl.static_range(COUNT):
        entries = entries + (tiles[k],)
    return entries


@triton.jit
def block_of(entries, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    """The inverse of ``entries_of``; zeros beside the entries."""
    tiles = ()
    for k in tl.static_range(2**LEVELS):
        tile = tl.zeros_like(entries[0])
        if k < COUNT:
            tile = entries[k]
        tiles = tiles + (tile,)
    for level in tl.static_range(LEVELS):
        joined = ()
        for k in tl.static_range(2 ** (LEVELS - 1 - level)):
            other = tiles[k + 2 ** (LEVELS - 1 - level)]
            joined = joined + (alternate(tiles[k], other, 2 ** (level + 1)),)
        tiles = joined
    return tl.reshape(tiles[0], [entries[0].shape[0], 2**LEVELS])


@triton.jit
def column_sums(matrix, N: tl.constexpr):
    """``matrix.sum(dim=-2)``, n [BT]."""
    sums = ()
    for i in tl.static_range(N):
        total = matrix[i]
        for o in tl.static_range(1, N):
            total += matrix[o * N + i]
        sums = sums + (total,)
    return sums


@triton.jit
def row_sums(matrix, N: tl.constexpr):
    """``matrix.sum(dim=-1)``, n [BT]."""
    sums = ()
    for o in tl.static_range(N):
        total = matrix[o * N]
        for i in tl.static_range(1, N):
            total += matrix[o * N + i]
        sums = sums + (total,)
    return sums


@triton.jit
def scale_columns(matrix, factors, N: tl.constexpr):
    scaled = ()
    for k in tl.static_range(N * N):
        scaled = scaled + (matrix[k] * factors[k % N],)
    return scaled


@triton.jit
def scale_rows(matrix, factors, N: tl.constexpr):
    scaled = ()
    for k in tl.static_range(N * N):
        scaled = scaled + (matrix[k] * factors[k // N],)
    return scaled


@triton.jit
def subtract_columns(matrix, shifts, N: tl.constexpr):
    shifted = ()
    for k in tl.static_range(N * N):
        shifted = shifted + (matrix[k] - shifts[k % N],)
    return shifted


@triton.jit
def subtract_rows(matrix, shifts, N: tl.constexpr):
    shifted = ()
    for k in tl.static_range(N * N):
        shifted = shifted + (matrix[k] - shifts[k // N],)
    return shifted


@triton.jit
def product(left, right, N: tl.constexpr):
    """Of two matrices, element by element."""
    products = ()
    for k in tl.static_range(N * N):
        products = products + (left[k] * right[k],)
    return products


@triton.jit
def exponentials(matrix, N: tl.constexpr):
    values = ()
    for k in tl.static_range(N * N):
        values = values + (tl.exp(matrix[k]),)
    return values


@triton.jit
def inverses(divisors, N: tl.constexpr):
    found = ()
    for k in tl.static_range(N):
        found = found + (1.0 / divisors[k],)
    return found


@triton.jit
def raised(divisors, floor, N: tl.constexpr):
    found = ()
    for k in tl.static_range(N):
        found = found + (divisors[k] + floor,)
    return found


@triton.jit
def log_column_softmax(logits, N: tl.constexpr):
    """``logits.log_softmax(dim=-2)``."""
    highest = ()
    for i in tl.static_range(N):
        top = logits[i]
        for o in tl.static_range(1, N):
            top = tl.maximum(top, logits[o * N + i])
        highest = highest + (top,)
    shifted = subtract_columns(logits, highest, N)
    totals = column_sums(exponentials(shifted, N), N)
    logs = ()
    for i in tl.static_range(N):
        logs = logs + (tl.log(totals[i]),)
    return subtract_columns(shifted, logs, N)


@triton.jit
def first_iteration(log_columns, eps, N: tl.constexpr, V4: tl.constexpr):
    """The first iteration of either Sinkhorn, and the divisors of its rows."""
    if V4:
        # res = logits.softmax(dim=-2) + eps; res = res / (res.sum(dim=-1) + eps)
        res = raised(exponentials(log_columns, N), eps, N * N)
        divisors = raised(row_sums(res, N), eps, N)
    else:
        # res = log_columns.softmax(dim=-1)
        highest = ()
        for o in tl.static_range(N):
            top = log_columns[o * N]
            for i in tl.static_range(1, N):
                top = tl.maximum(top, log_columns[o * N + i])
            highest = highest + (top,)
        res = exponentials(subtract_rows(log_columns, highest, N), N)
        divisors = row_sums(res, N)
    return scale_rows(res, inverses(divisors, N), N), divisors


@triton.jit
def sinkhorn_fwd(
    logits,
    eps,
    history_ptr,
    tokens,
    live,
    T,
    N: tl.constexpr,
    ITERATIONS: tl.constexpr,
    V4: tl.constexpr,
    HISTORY: tl.constexpr,
):
    """``sinkhorn`` or ``sinkhorn_v4``; with HISTORY every divisor is kept for ``sinkhorn_bwd``.

    ``history``: [2 * (iterations - 1) * n, T], columns' and rows' divisors of each iteration.
    """
    res, _ = first_iteration(log_column_softmax(logits, N), eps, N, V4)
    for step in range(ITERATIONS - 1):
        # res = res / (res.sum(dim=-2) (+ eps))
        columns = column_sums(res, N)
        if V4:
            columns = raised(columns, eps, N)
        res = scale_columns(res, inverses(columns, N), N)
        # res = res / (res.sum(dim=-1) (+ eps))
        rows = row_sums(res, N)
        if V4:
            rows = raised(rows, eps, N)
        res = scale_rows(res, inverses(rows, N), N)
        if HISTORY:
            store_divisors(history_ptr, columns, 2 * step, tokens, live, T, N)
            store_divisors(history_ptr, rows, 2 * step + 1, tokens, live, T, N)
    return res


@triton.jit
def store_divisors(history_ptr, divisors, step, tokens, live, T, N: tl.constexpr):
    for k in tl.static_range(N):
        tl.store(history_ptr + (step * N + k) * T + tokens, divisors[k], mask=live)


@triton.jit
def load_divisors(history_ptr, step, tokens, live, T, N: tl.constexpr):
    divisors = ()
    for k in tl.static_range(N):
        pointers = history_ptr + (step * N + k) * T + tokens
        divisors = divisors + (tl.load(pointers, mask=live, other=1.0),)
    return divisors


@triton.jit
def later_iterations_bwd(
    logits,
    grad,
    eps,
    history_ptr,
    tokens,
    live,
    T,
    N: tl.constexpr,
    ITERATIONS: tl.constexpr,
    V4: tl.constexpr,
):
    """The gradient of the first iteration's result: the others, walked back through.

    A normalisation ``m' = m / d`` with ``d = sum(m) + eps`` has the gradient
    ``(grad' - sum(grad' m')) / d``, and ``m = m' d`` is had again from the divisors alone.
    """
    res = sinkhorn_fwd(logits, eps, history_ptr, tokens, live, T, N, ITERATIONS, V4, True)
    if ITERATIONS > 1:
        # Threads that hold copies of a token may read what another of them wrote.
        tl.debug_barrier()
        last: tl.constexpr = 2 * (ITERATIONS - 2)
        rows = load_divisors(history_ptr, last + 1, tokens, live, T, N)
        columns = load_divisors(history_ptr, last, tokens, live, T, N)
        for back in range(ITERATIONS - 1):
            # The next step's divisors are on their way while this one computes.
            ahead = tl.maximum(2 * (ITERATIONS - 3 - back), 0)
            next_rows = load_divisors(history_ptr, ahead + 1, tokens, live, T, N)
            next_columns = load_divisors(history_ptr, ahead, tokens, live, T, N)
            # res = res / (res.sum(dim=-1) + eps)
            grad = subtract_rows(grad, row_sums(product(grad, res, N), N), N)
            grad = scale_rows(grad, inverses(rows, N), N)
            res = scale_rows(res, rows, N)
            # res = res / (res.sum(dim=-2) + eps)
            grad = subtract_columns(grad, column_sums(product(grad, res, N), N), N)
            grad = scale_columns(grad, inverses(columns, N), N)
            res = scale_columns(res, columns, N)
            rows, columns = next_rows, next_columns
    return grad


@triton.jit
def first_iteration_bwd(logits, grad, eps, N: tl.constexpr, V4: tl.constexpr):
    """The gradient of the logits from that of the first iteration's result."""
    log_columns = log_column_softmax(logits, N)
    res, divisors = first_iteration(log_columns, eps, N, V4)
    grad = subtract_rows(grad, row_sums(product(grad, res, N), N), N)
    softmax = exponentials(log_columns, N)
    if V4:
        # res = logits.softmax(dim=-2) + eps; res = res / (res.sum(dim=-1) + eps)
        grad = scale_rows(grad, inverses(divisors, N), N)
        grad = subtract_columns(grad, column_sums(product(grad, softmax, N), N), N)
        grad = product(softmax, grad, N)
    else:
        # res = logits.log_softmax(dim=-2).softmax(dim=-1)
        grad = product(grad, res, N)
        grad = subtract(grad, scale_columns(softmax, column_sums(grad, N), N), N)
    return grad


@triton.jit
def subtract(left, right, N: tl.constexpr):
    differences = ()
    for k in tl.static_range(N * N):
        differences = differences + (left[k] - right[k],)
    return differences


@triton.jit
def load_permutation(matrices_ptr, index, N: tl.constexpr, NN: tl.constexpr):
    """P_k of the table [n!, n, n], [1, NN]."""
    entry = tl.arange(0, NN)
    pointers = matrices_ptr + index * (N * N) + entry
    return tl.load(pointers, mask=entry < N * N, other=0.0)[None, :]
