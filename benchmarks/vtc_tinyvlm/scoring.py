"""Answer scoring."""

from __future__ import annotations


def is_correct(generated_text: str, answer: str) -> bool:
    """Is the first word of the generated text the answer? (What an exact match reads once it strips the rest.)"""
    words = generated_text.split()
    return bool(words) and words[0].lower() == answer.lower()


def is_exact(generated_text: str, answer: str) -> bool:
    """Is the generated text, up to the end token, the answer and nothing else? Needs a model that stops by itself."""
    return generated_text.strip().lower() == answer.lower()
