"""The least a greedy pick can cost: a kernel that does nothing but the dependency.

A pick has to read a row that the last pick named, bring the state up to date and find the best entry; only then is the
next row known. One program, a state that stays in registers, rows that stay in the cache: no kernel that makes k picks
one after the other can be faster than k of these.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chain(rows, last, steps, N: tl.constexpr):
    """``steps`` dependent picks over float32 rows [N, N]; the last one is stored at ``last``, int32 [1]."""
    lanes = tl.arange(0, N)
    state = tl.zeros((N,), tl.float32) - 2.0
    pick = tl.program_id(0)  # 0, in the type of the picks
    for _ in range(steps):
        state = tl.maximum(state, tl.load(rows + pick * N + lanes))
        pick = tl.argmin(state, 0)
    tl.store(last, pick)
