"""What the greedy family runs on a GPU: the kernels, which ``vtc.ops.kernels.greedy`` launches.

**The same integers.** As in :mod:`vtc.ops.recursion`, whose picks these are bit for bit, rows are scaled to length
UNIT and rounded to integers, so that every order of summation gives the same similarity. An integer is three balanced
digits of base 256; a product of rows is nine products of digits on int8 matrix units, added up in int32 by weight (five
weights, exact up to d = WIDEST) and put together in float64, exactly. The length itself is summed so that the order
does not matter either (``_length``). Batch, padding, tile size, regime and chip change no bit.

Work stops behind the last token that counts in an image, so a batch of different N costs what its images cost.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vtc.ops import recursion

WIDEST = 2**31 // (3 * 2**14)  # 43690: three digit products of d summands fit in int32
PAD_TOKENS = tl.constexpr(128)
PAD_WIDTH = tl.constexpr(128)
CHUNK = tl.constexpr(32)  # columns that lie together: digits are stored [chunks, tokens, CHUNK], a tile in one piece

_UNIT = tl.constexpr(recursion.UNIT)
_UNIT_SQUARED = tl.constexpr(recursion.UNIT**-2)
_PADDING = tl.constexpr(recursion._PADDING)
_LONE = tl.constexpr(recursion._LONE)
_MOST = tl.constexpr(recursion.MOST)
_INFINITY = tl.constexpr(float("inf"))
_ROUND = tl.constexpr(1.5 * 2.0**52)  # added and taken away again, it rounds float64 to integers, ties to even
_EXPONENT = tl.constexpr(0x7FF0000000000000)
_SMALL = tl.constexpr(2.0**-52)


@triton.jit
def _integers(values, scale):
    """Float64 integers of at most UNIT, [rows, columns]; ``scale`` [rows] is 0 for a row without a direction."""
    scaled = values.to(tl.float64) * scale[:, None]
    return tl.where((scale > 0)[:, None], (scaled + _ROUND) - _ROUND, 0.0)


@triton.jit(do_not_specialize=["n", "tiles", "balance"])
def begin(mask, importance, weights, start, length, first, base, nearest, n, tiles, balance, BLOCK: tl.constexpr):
    """An image's base, how far its tokens go, and its first pick if that needs no similarity. One program each."""
    image = tl.program_id(0).to(tl.int64)
    padded = tiles * PAD_TOKENS
    last = tl.full((BLOCK,), -1, tl.int32)
    best = tl.full((BLOCK,), -_INFINITY, tl.float32)
    best_at = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, padded, BLOCK):
        token = at + tl.arange(0, BLOCK)
        real = tl.load(mask + image * n + token, token < n, 0) != 0
        last = tl.where(real, token, last)
        value = tl.zeros((BLOCK,), tl.float32)
        if importance is not None:
            value = tl.load(importance + image * n + token, token < n, 0.0)
            score = tl.where(token < n, tl.where(real, value, _PADDING), -_INFINITY)
            better = score > best
            best = tl.where(better, score, best)
            best_at = tl.where(better, token, best_at)
        value = balance * value
        if weights is not None:
            value = tl.load(weights + image * n + token, token < n, 0.0)
        value = tl.where(token < n, tl.where(real, value, _PADDING), -_INFINITY)
        tl.store(base + image * padded + token, value, token < padded)
        if nearest is not None:
            tl.store(nearest + image * padded + token, tl.full((BLOCK,), _LONE, tl.float32), token < padded)
    end = tl.max(last, 0) + 1
    if start is not None:
        pick = tl.load(start + image).to(tl.int32)
        tl.store(first + image, pick)
        end = tl.maximum(end, pick + 1)
    if importance is not None:
        pick = tl.min(tl.where(best == tl.max(best, 0), best_at, n), 0)
        tl.store(first + image, pick)
        end = tl.maximum(end, pick + 1)
    tl.store(length + image, end)


@triton.jit
def _length(pointers, there, d, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Euclidean length of rows in float64, the same bits in whatever order the squares are added up.

    The squares are cut in two at a power of two that depends on their maximum alone, so coarse that each part's sum has
    no rounding (Demmel and Nguyen, Fast reproducible floating-point summation, 2013).
    """
    most = tl.zeros((ROWS,), tl.float64)
    for at in range(0, d, BLOCK):
        inside = there[:, None] & (at + tl.arange(0, BLOCK) < d)[None, :]
        most = tl.maximum(most, tl.max(tl.abs(tl.load(pointers + at, inside, 0.0).to(tl.float64)), 1))
    power = ((most * most).to(tl.int64, bitcast=True) & _EXPONENT).to(tl.float64, bitcast=True)
    total = power * (2 * SPAN)  # no less than the sum of the squares
    coarse = (1.5 * total)[:, None]
    fine = (1.5 * SPAN * (total * _SMALL))[:, None]
    upper = tl.zeros((ROWS, BLOCK), tl.float64)
    lower = tl.zeros((ROWS, BLOCK), tl.float64)
    for at in range(0, d, BLOCK):
        inside = there[:, None] & (at + tl.arange(0, BLOCK) < d)[None, :]
        value = tl.load(pointers + at, inside, 0.0).to(tl.float64)
        square = value * value
        cut = (square + coarse) - coarse
        upper += cut
        lower += ((square - cut) + fine) - fine
    return tl.sqrt(tl.sum(upper, 1) + tl.sum(lower, 1))


@triton.jit(do_not_specialize=["n", "d", "tiles", "chunks", "batch_stride", "row_stride"])
def digits(
    x, length, scale, planes, n, d, tiles, chunks, batch_stride, row_stride,
    ALIGNED: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a row is multiplied by to have length UNIT, 0 if it has no direction, and its integers' digits."""
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    end = tl.load(length + image)
    if tl.program_id(0) * ROWS >= end:
        return
    if ALIGNED:  # says so in a way that the compiler understands: it then loads 16 bytes at a time
        d, row_stride, batch_stride = d // 16 * 16, row_stride // 16 * 16, batch_stride // 16 * 16
    there = row < end
    column = tl.arange(0, BLOCK)
    pointers = x + image * batch_stride + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    factor = _UNIT / _length(pointers, there, d, SPAN, ROWS, BLOCK)
    factor = tl.where((factor > 0) & (factor < _INFINITY), factor, 0.0)
    tl.store(scale + image * n + row, factor, there)
    if planes is not None:
        depth, padded = chunks * CHUNK, tiles.to(tl.int64) * PAD_TOKENS
        plane = padded * depth
        stored = column // CHUNK * padded * CHUNK + column % CHUNK
        to = planes + image * 3 * plane + (row * CHUNK)[:, None] + stored[None, :]
        for at in range(0, depth, BLOCK):
            value = tl.load(pointers + at, there[:, None] & (at + column < d)[None, :], 0.0)
            rest = _integers(value, factor).to(tl.int32)
            low = ((rest + 128) & 255) - 128
            rest = (rest - low) >> 8
            middle = ((rest + 128) & 255) - 128
            high = (rest - middle) >> 8
            inside = there[:, None] & (at + column < depth)[None, :]
            tl.store(to, low.to(tl.int8), inside)
            tl.store(to + plane, middle.to(tl.int8), inside)
            tl.store(to + 2 * plane, high.to(tl.int8), inside)
            to += padded * BLOCK


@triton.jit(do_not_specialize=["tiles", "chunks"])
def gram(
    planes, length, base, matrix, nearest, tiles, chunks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of all similarities and its mirror image, and how near each token's nearest neighbour is."""
    image = tl.program_id(1).to(tl.int64)
    tall, wide = tiles * (PAD_TOKENS // ROWS), tiles * (PAD_TOKENS // COLUMNS)
    group = tl.program_id(0) // (GROUP * wide)  # tiles of GROUP rows of tiles, column by column, share the cache
    rows_of_tiles = tl.minimum(tall - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * wide)
    top = (group * GROUP + within % rows_of_tiles) * ROWS
    left = (within // rows_of_tiles) * COLUMNS
    end = tl.load(length + image)
    if (left + COLUMNS <= top) | (top >= end) | (left >= end):
        return
    padded = tiles * PAD_TOKENS
    plane = padded.to(tl.int64) * CHUNK * chunks
    row, column = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
    at = tl.arange(0, DEPTH)
    at = at // CHUNK * (padded * CHUNK) + at % CHUNK
    a = planes + image * 3 * plane + (row * CHUNK)[:, None] + at[None, :]
    b = planes + image * 3 * plane + (column * CHUNK)[None, :] + at[:, None]
    s0 = tl.zeros((ROWS, COLUMNS), tl.int32)
    s1 = tl.zeros((ROWS, COLUMNS), tl.int32)
    s2 = tl.zeros((ROWS, COLUMNS), tl.int32)
    s3 = tl.zeros((ROWS, COLUMNS), tl.int32)
    s4 = tl.zeros((ROWS, COLUMNS), tl.int32)
    # At least once: where it could be skipped, LLVM moves the conversion to float64 into it, and registers spill.
    for _ in range(tl.maximum(chunks * CHUNK // DEPTH, 1)):
        a0, a1, a2 = tl.load(a), tl.load(a + plane), tl.load(a + 2 * plane)
        b0, b1, b2 = tl.load(b), tl.load(b + plane), tl.load(b + 2 * plane)
        s0 = tl.dot(a0, b0, s0, out_dtype=tl.int32)
        s1 = tl.dot(a0, b1, s1, out_dtype=tl.int32)
        s1 = tl.dot(a1, b0, s1, out_dtype=tl.int32)
        s2 = tl.dot(a0, b2, s2, out_dtype=tl.int32)
        s2 = tl.dot(a1, b1, s2, out_dtype=tl.int32)
        s2 = tl.dot(a2, b0, s2, out_dtype=tl.int32)
        s3 = tl.dot(a1, b2, s3, out_dtype=tl.int32)
        s3 = tl.dot(a2, b1, s3, out_dtype=tl.int32)
        s4 = tl.dot(a2, b2, s4, out_dtype=tl.int32)
        a += padded * DEPTH
        b += padded * DEPTH
    sum_of_all = s4.to(tl.float64)
    sum_of_all = sum_of_all * 256 + s3.to(tl.float64)
    sum_of_all = sum_of_all * 256 + s2.to(tl.float64)
    sum_of_all = sum_of_all * 256 + s1.to(tl.float64)
    sum_of_all = sum_of_all * 256 + s0.to(tl.float64)
    cosine = (sum_of_all * _UNIT_SQUARED).to(tl.float32)
    if matrix is not None:
        to = matrix + image * padded * padded
        tl.store(to + row.to(tl.int64)[:, None] * padded + column[None, :], cosine)
        tl.store(to + column.to(tl.int64)[None, :] * padded + row[:, None], cosine)
    if nearest is not None:
        real_row = tl.load(base + image * padded + row) > _PADDING
        real_column = tl.load(base + image * padded + column) > _PADDING
        other = real_row[:, None] & real_column[None, :] & (row[:, None] != column[None, :])
        near = tl.where(other, cosine, _LONE)
        tl.atomic_max(nearest + image * padded + row, tl.max(near, 1), sem="relaxed")
        tl.atomic_max(nearest + image * padded + column, tl.max(near, 0), sem="relaxed")


@triton.jit
def _isolated(base, nearest, token, padded, BLOCK: tl.constexpr):
    """The score by which farthest-first finds its own start, and the base."""
    value = tl.load(base + token, token < padded, -_INFINITY)
    near = tl.load(nearest + token, token < padded, 0.0)
    return tl.where(value > _PADDING, -near, value), value


@triton.jit
def _score(value, penalty, weight, WEIGHTED: tl.constexpr, EACH: tl.constexpr):
    """Base minus weighted penalty. With EACH a token weighs as much as its base says; padding and picks keep theirs."""
    if EACH:
        score = value - tl.where(value > _PADDING, value, 0.0) * tl.minimum(penalty, _MOST)
    else:
        score = value - weight * penalty if WEIGHTED else value - penalty
    return score


@triton.jit(do_not_specialize=["tiles", "k", "weight"])
def loop(
    matrix, length, base, nearest, first, out, tiles, k, weight,
    WEIGHTED: tl.constexpr, EACH: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All picks of one image, whose similarities are known."""
    image = tl.program_id(0).to(tl.int64)
    padded = tiles * PAD_TOKENS
    token = tl.arange(0, BLOCK)
    end = tl.load(length + image)
    if nearest is not None:
        score, value = _isolated(base + image * padded, nearest + image * padded, token, padded, BLOCK)
        pick = tl.argmax(score, 0)
    else:
        value = tl.load(base + image * padded + token, token < padded, -_INFINITY)
        pick = tl.load(first + image)
    tl.store(out + image * k, pick.to(tl.int64))
    matrix += image * padded * padded
    penalty = tl.zeros((BLOCK,), tl.float64) if SUM else tl.full((BLOCK,), -_INFINITY, tl.float32)
    for j in range(1, k):
        value = tl.where(token == pick, -_INFINITY, value)
        row = tl.load(matrix + pick.to(tl.int64) * padded + token, token < padded, 0.0)
        row = tl.where((token < end) & (pick < end), row, 0.0)  # nobody computed similarities behind the end
        if SUM:
            penalty += row.to(tl.float64)
        else:
            penalty = tl.maximum(penalty, row)
        pick = tl.argmax(_score(value, penalty, weight, WEIGHTED, EACH), 0)
        tl.store(out + image * k + j, pick.to(tl.int64))


@triton.jit(do_not_specialize=["n", "tiles"])
def isolated(base, nearest, first, n, tiles, BLOCK: tl.constexpr):
    """The most isolated token of an image: one program each."""
    image = tl.program_id(0).to(tl.int64)
    padded = tiles * PAD_TOKENS
    best = tl.full((BLOCK,), -_INFINITY, tl.float32)
    best_at = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, padded, BLOCK):
        token = at + tl.arange(0, BLOCK)
        score, _ = _isolated(base + image * padded, nearest + image * padded, token, padded, BLOCK)
        better = score > best
        best = tl.where(better, score, best)
        best_at = tl.where(better, token, best_at)
    tl.store(first + image, tl.min(tl.where(best == tl.max(best, 0), best_at, n), 0))


@triton.jit(
    do_not_specialize=["n", "d", "tiles", "batch_stride", "row_stride", "weight", "j", "k"],
)
def step(
    x, scale, length, base, penalty, first, best, best_at, out,
    n, d, tiles, batch_stride, row_stride, weight, j, k,
    ALIGNED: tl.constexpr, WEIGHTED: tl.constexpr, EACH: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Pick j, the state of a block of rows after it, and the best of the block for pick j + 1.

    ``penalty`` [2, images, tokens], ``best`` and ``best_at`` [2, images, blocks] hold what the previous launch wrote
    and what this one writes.
    """
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks, padded = tl.cdiv(n, ROWS), tiles * PAD_TOKENS
    images = tl.num_programs(1).to(tl.int64)
    if ALIGNED:  # says so in a way that the compiler understands: it then loads 16 bytes at a time
        d, row_stride, batch_stride = d // 16 * 16, row_stride // 16 * 16, batch_stride // 16 * 16
    if j == 0:
        pick = tl.load(first + image)
    else:
        part = tl.arange(0, PARTS)
        at = ((j % 2) * images + image) * blocks + part
        scores = tl.load(best + at, part < blocks, -_INFINITY)
        tokens = tl.load(best_at + at, part < blocks, n)
        pick = tl.min(tl.where(scores == tl.max(scores, 0), tokens, n), 0)
    if block == 0:
        tl.store(out + image * k + j, pick.to(tl.int64))
    if j == k - 1:
        return
    token = block * ROWS + tl.arange(0, ROWS)
    here = image * padded + token
    value = tl.where(token == pick, -_INFINITY, tl.load(base + here))
    tl.store(base + here, value)
    # The state, too, is read in one place and written in another: several threads may hold the same token.
    state = tl.load(penalty + (j % 2) * images * padded + here)
    state = tl.where(j > 0, state, 0.0 if SUM else -_INFINITY)
    end = tl.load(length + image)
    row = tl.zeros((ROWS,), tl.float32)  # of padding behind the end, whose base hides it
    if (block * ROWS < end) & (pick < end):
        there = token < end
        own = tl.load(scale + image * n + token, there, 0.0)
        its = tl.load(scale + image * n + pick + tl.zeros((1,), tl.int32))
        column = tl.arange(0, BLOCK)
        rows = x + image * batch_stride + token.to(tl.int64)[:, None] * row_stride + column[None, :]
        picked = x + image * batch_stride + pick.to(tl.int64) * row_stride + column[None, :]
        dot = tl.zeros((ROWS, BLOCK), tl.float64)
        for at in tl.range(0, d, BLOCK, num_stages=3):
            inside = (at + column < d)[None, :]
            left = _integers(tl.load(rows + at, there[:, None] & inside, 0.0), own)
            dot += left * _integers(tl.load(picked + at, inside, 0.0), its)
        row = (tl.sum(dot, 1) * _UNIT_SQUARED).to(tl.float32)
    if SUM:
        state += row.to(tl.float64)
    else:
        state = tl.maximum(state, row)
    tl.store(penalty + ((j + 1) % 2) * images * padded + here, state)
    score = _score(value, state, weight, WEIGHTED, EACH)
    top = tl.max(score, 0)
    at = (((j + 1) % 2) * images + image) * blocks + block
    tl.store(best + at, top)
    tl.store(best_at + at, tl.min(tl.where(score == top, token, n), 0))
