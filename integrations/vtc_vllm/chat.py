"""Chat templates as vLLM needs them: BOS once, at the beginning.

transformers puts BOS in front of what a template wrote, unless it is there already; so many templates leave it out.
vLLM adds nothing. With such a template its prompts begin without BOS, and answers are others.
"""

from __future__ import annotations

import contextlib
from typing import Any

SHIPPED = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
"""How the shipped models were asked in training; without BOS."""


def begun(template: str, tokenizer: Any) -> str:
    """The template, with BOS in front where the tokenizer begins every text with it and the template does not.

    Args:
        template: in Jinja. One that can write none of our messages is left as it is.
        tokenizer: of transformers.
    """
    begin = tokenizer.bos_token
    if not begin or tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return template
    written = _written(template, tokenizer)
    return template if written is None or written.startswith(begin) else "{{ bos_token }}" + template


def _written(template: str, tokenizer: Any) -> str | None:
    for content in ([{"type": "text", "text": "?"}], "?"):  # what templates take for a message's content
        with contextlib.suppress(Exception):  # a template may raise anything
            return tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
    return None


def instead(checkpoint: str) -> str | None:
    """The template that a server of this checkpoint has to be given, or ``None`` where the checkpoint's own is right.

    Args:
        checkpoint: a folder or a name on the hub.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError, ImportError):  # the server needs it too, and says what is missing
        return None
    tokenizer = getattr(processor, "tokenizer", processor)
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if not isinstance(template, str):  # none, or several by name
        return None
    found = begun(template, tokenizer)
    return None if found == template else found
