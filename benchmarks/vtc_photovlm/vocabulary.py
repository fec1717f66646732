"""Words, and the tokenizer: whole words, numbers digit by digit, plurals as a word and its ending.

It is a WordPiece model: ``347`` is ``3 ##4 ##7`` and ``frogs`` is ``frog ##s``, and decoding joins them again.
"""

from __future__ import annotations

from typing import Any

from .catalogue import CLASSES, PLURALS
from .charts import COLORS, MONTHS
from .documents import KEYS, WORDS

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(5)
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
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece(VOCABULARY, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(list(SPECIAL))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
