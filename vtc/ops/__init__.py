"""Pure tensor functions: batched, free of host synchronisation, traceable into one graph, deterministic."""

from vtc.ops.density import density_peaks, squared_distances, to_peaks
from vtc.ops.determinant import max_determinant
from vtc.ops.graph import over_heads, pagerank, without_similar
from vtc.ops.greedy import farthest_first, max_marginal_relevance, max_sum
from vtc.ops.merging import cosines, cosines_to, first_near, gathered, nearest
from vtc.ops.recursion import first_max
from vtc.ops.scores import crop_budgets, instruction_attention, transition_variation

__all__ = [
    "cosines",
    "cosines_to",
    "crop_budgets",
    "density_peaks",
    "farthest_first",
    "first_max",
    "first_near",
    "gathered",
    "instruction_attention",
    "max_determinant",
    "max_marginal_relevance",
    "max_sum",
    "nearest",
    "over_heads",
    "pagerank",
    "squared_distances",
    "to_peaks",
    "transition_variation",
    "without_similar",
]
