"""Ask a served model with the OpenAI client: several images in one question, and the answer as it is generated.

Start a server first, `vtc serve tinyvlm --keep 0.25`, then `python integrations/vtc_vllm/examples/openai_client.py`.
Any server and files will do:
`--url http://127.0.0.1:8000/v1 --model tinyvlm --image a.png --image b.png "what is it ?"`. With `--keep 0.5` or
`--keep 64` the request asks for a keep of its own. The key is read from OPENAI_API_KEY, as the client does.
"""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Annotated

import typer
from openai import OpenAI


def data_url(picture: bytes) -> str:
    """A picture inside the request itself."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def scene() -> tuple[bytes, str]:
    """A picture and a question of those that tinyvlm was made for."""
    import vtc_tinyvlm

    question = vtc_tinyvlm.evaluation_questions(1)[0]
    buffer = io.BytesIO()
    question.image.save(buffer, "PNG")
    return buffer.getvalue(), question.prompt.removeprefix("<image> ")


def main(
    question: Annotated[str, typer.Argument(help="What to ask; default: a question about a scene.")] = "",
    image: Annotated[list[Path] | None, typer.Option(help="An image file; repeatable.")] = None,
    url: Annotated[str, typer.Option(help="Of the server.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, typer.Option(help="Its name there.")] = "tinyvlm",
    tokens: Annotated[int, typer.Option(help="The answer is cut there.")] = 16,
    keep: Annotated[
        str, typer.Option(help="0.5: half of each image's tokens; 64: that many; default: the server's.")
    ] = "",
) -> None:
    """Print the answer while it comes, then how long the prompt was."""
    pictures = [path.read_bytes() for path in image or []]
    if not pictures:
        picture, asked = scene()
        pictures, question = [picture], question or asked
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    own = {"vtc_keep": float(keep) if "." in keep else int(keep)} if keep else {}
    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"mm_processor_kwargs": own},
    )
    for chunk in stream:
        for choice in chunk.choices:
            typer.echo(choice.delta.content or "", nl=False)
        if chunk.usage is not None:
            typer.echo(f"\n[{len(pictures)} images, {chunk.usage.prompt_tokens} tokens in the prompt]", err=True)


if __name__ == "__main__":
    typer.run(main)
