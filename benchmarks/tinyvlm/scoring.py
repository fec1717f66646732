"""Answer scoring and intervals."""

from __future__ import annotations

import math


def is_correct(generated_text: str, answer: str) -> bool:
    """Is the first word of the generated text the answer? (What an exact match reads once it strips the rest.)"""
    words = generated_text.split()
    return bool(words) and words[0].lower() == answer.lower()


def is_exact(generated_text: str, answer: str) -> bool:
    """Is the generated text, up to the end token, the answer and nothing else? Needs a model that stops by itself."""
    return generated_text.strip().lower() == answer.lower()


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion."""
    if total == 0:
        return 0.0, 1.0
    p = right / total
    centre = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
