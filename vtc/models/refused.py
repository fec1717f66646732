"""Families that vtc refuses by name: what makes each impossible."""

from __future__ import annotations

REFUSED: dict[str, str] = {
    "llama4": "its decoder attends in fixed chunks of positions, which do not survive dropped tokens",
    "mllama": "its visual tokens enter through cross-attention and are not in the decoder's sequence",
    "idefics": "its visual tokens enter through cross-attention and are not in the decoder's sequence",
    "t5gemma2": "it is an encoder-decoder: visual tokens are not in the decoder's sequence",
    "fuyu": "its image patches go straight into the language model, without an encoder to listen to",
    "florence2": "it is an encoder-decoder: visual tokens are not in the decoder's sequence",
    "blip-2": "a Q-former compresses its image already, and its language model need not be a decoder",
    "instructblip": "a Q-former compresses its image already, and its language model need not be a decoder",
}
"""Families that are known not to work, and why."""
