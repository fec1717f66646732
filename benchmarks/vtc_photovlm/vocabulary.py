"""Words, and the tokenizer: whole words, numbers digit by digit, plurals as a word and its ending.

It is a WordPiece model: ``347`` is ``3 ##4 ##7`` and ``frogs`` is ``frog ##s``, and decoding joins them again.
"""

from __future__ import annotations

from typing import Any

from vtc_tinyvlm.building import SPECIAL, fast_tokenizer

from .catalogue import CLASSES, PLURALS
from .charts import COLORS, MONTHS
from .documents import KEYS, WORDS

_PLAIN = (
    "what", "which", "how", "many", "is", "are", "there", "the", "a", "an", "of", "in", "on", "or", "?",
    "corner", "number", "sign", "farthest", "value", "bar", "color", "month", "highest", "lowest",
    "left", "right", "above", "below", "topleft", "topright", "bottomleft", "bottomright", "yes", "no",
)  # fmt: skip
_NUMBERS = (*"0123456789", *(f"##{digit}" for digit in range(10)), "##s", "##es")
WORDS_OF_ALL = (*SPECIAL, *_PLAIN, *_NUMBERS, *CLASSES, *PLURALS.values(), *COLORS, *MONTHS, *KEYS, *WORDS)
VOCABULARY = {word: index for index, word in enumerate(dict.fromkeys(WORDS_OF_ALL))}


def pieces(text: str) -> list[list[int]]:
    """Token ids of each word of a text, by the same rules as the tokenizer's; for training.

    Raises:
        KeyError: a word is not in the vocabulary.
    """
    return [_word(word) for word in text.split()]


def _word(word: str) -> list[int]:
    if word in VOCABULARY:
        return [VOCABULARY[word]]
    if word.isdigit():
        return [VOCABULARY[word[0]], *(VOCABULARY[f"##{digit}"] for digit in word[1:])]
    ending = "s" if word[:-1] in VOCABULARY else "es"
    return [VOCABULARY[word.removesuffix(ending)], VOCABULARY[f"##{ending}"]]


def build_tokenizer(model_max_length: int = 512) -> Any:
    """The tokenizer as a fast one of transformers, left padding, with a leading ``<bos>``."""
    from tokenizers import decoders, models

    pieces_of = models.WordPiece(VOCABULARY, unk_token="<unk>")
    return fast_tokenizer(pieces_of, decoders.WordPiece(cleanup=False), model_max_length)
