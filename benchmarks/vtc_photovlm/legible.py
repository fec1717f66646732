"""Can the encoder's features be read? `python -m vtc_photovlm.legible` tries it before anything is trained.

Pages of numbers in many sizes are encoded. From the features of the patch under each digit's middle (`patch`, linear)
or of the nine around it (`around`, one hidden layer) a read-out names the digit, for several layers of the encoder.
It is tried on new pages in the fonts it was fitted on, and in fonts it never saw. Chance is 10 %.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from torch import Tensor, nn

from . import encoder
from .catalogue import FONTS
from .features import pixels_of
from .marks import GRID
from .photos import SIZE
from .scenes import shipped_assets

SIZES = ((13, 17), (17, 21), (21, 25), (25, 29), (29, 33))
"""Fonts in px, from and below."""
AROUND = [row * GRID + column for row in (-1, 0, 1) for column in (-1, 0, 1)]


def page(fonts: tuple[str, ...], rng: np.random.Generator) -> tuple[Image.Image, list[tuple[int, int, int]]]:
    """A page of numbers; of each digit what it is, the patch under its middle, and its font's size."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.integers(190, 255, 3).tolist()))
    draw, digits, y = ImageDraw.Draw(image), [], 4
    while y < SIZE - 28:
        size = int(rng.integers(SIZES[0][0], SIZES[-1][1]))
        font = shipped_assets().font(fonts[rng.integers(len(fonts))], size)
        ink, x = tuple(rng.integers(0, 90, 3).tolist()), float(rng.integers(4, 30))
        while x < SIZE - 54:
            for digit in str(rng.integers(100, 1000)):
                draw.text((x, y), digit, font=font, fill=ink)
                left, top, right, bottom = draw.textbbox((x, y), digit, font=font)
                patch = min(GRID - 1, int((top + bottom) / 2 // 14)) * GRID + min(
                    GRID - 1, int((left + right) / 2 // 14)
                )
                digits.append((int(digit), patch, size))
                x += font.getlength(digit)
            x += float(rng.integers(12, 30))
        y += size + int(rng.integers(4, 12))
    return image, digits


@torch.inference_mode()
def examples(
    tower: Any, fonts: tuple[str, ...], pages: int, layers: tuple[int, ...], rng: np.random.Generator
) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    """Of each digit the features around it [n, 9, width] for each layer, what it is [n], and its size [n]."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    about: list[tuple[int, int, int]] = []
    for start in range(0, pages, 16):
        drawn = [page(fonts, rng) for _ in range(min(16, pages - start))]
        with torch.autocast("cpu", torch.bfloat16):
            states = tower(pixels_of([image for image, _ in drawn]), output_hidden_states=True).hidden_states
        for b, (_, digits) in enumerate(drawn):
            patches = torch.tensor([patch for _, patch, _ in digits])[:, None] + torch.tensor(AROUND)
            for layer in layers:
                found[layer].append(states[layer][b, 1 + patches.clamp(0, GRID * GRID - 1)].half())
            about += digits
    numbers = torch.tensor(about)
    return {layer: torch.cat(x) for layer, x in found.items()}, numbers[:, 0], numbers[:, 2]


def fit(net: nn.Module, features: Tensor, digits: Tensor, rate: float, epochs: int = 8) -> None:
    """Train a read-out."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.1)
    for _ in range(epochs):
        for some in torch.randperm(len(digits)).split(256):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(net(features[some].float()), digits[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.6


def read_out(kind: str, train: Tensor) -> nn.Module:
    """A linear layer or one with a hidden layer, behind standardisation by what it is trained on [n, width]."""
    norm = nn.BatchNorm1d(train.shape[1], affine=False, momentum=None)
    with torch.no_grad():
        norm(train.float())
    norm.eval()
    if kind == "patch":
        return nn.Sequential(norm, nn.Linear(train.shape[1], 10))
    return nn.Sequential(norm, nn.Linear(train.shape[1], 192), nn.GELU(), nn.Linear(192, 10))


def main(
    layers: Annotated[
        str, typer.Option(help="Hidden states of the encoder, with commas; 6+12: side by side.")
    ] = "6,12,6+12",
    pages: Annotated[int, typer.Option(help="To fit on; a fifth as many to try on.")] = 480,
    threads: int = 1,
) -> None:
    """Print a table: read-out, layers, per cent of digits right by size of the font."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rng, tower = np.random.default_rng(0), encoder.load(SIZE)
    wanted = tuple(sorted({int(n) for each in layers.split(",") for n in each.split("+")}))
    parts = [
        examples(tower, FONTS[split], count, wanted, rng)
        for split, count in (("train", pages), ("train", pages // 5), ("validation", pages // 5))
    ]
    heads = [f"{a}-{b - 1} px" for a, b in SIZES]
    typer.echo(f"| read-out | layers | fonts | {' | '.join(heads)} |\n{'| --- ' * (3 + len(heads))}|")
    for kind in ("patch", "around"):
        for each in layers.split(","):
            x = [torch.cat([states[int(n)] for n in each.split("+")], -1) for states, _, _ in parts]
            x = [part[:, 4] if kind == "patch" else part.flatten(1) for part in x]
            net = read_out(kind, x[0])
            fit(net, x[0], parts[0][1], 5e-3 if kind == "patch" else 1.5e-3)
            for fonts, part, (_, digits, sizes) in zip(("seen", "unseen"), x[1:], parts[1:], strict=True):
                right = (net(part.float()).argmax(-1) == digits).float()
                cells = [f"{100 * right[(sizes >= a) & (sizes < b)].mean():.1f}" for a, b in SIZES]
                typer.echo(f"| {kind} | {each} | {fonts} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
