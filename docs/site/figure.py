"""`python docs/site/figure.py`: draw docs/pictures/before-after.png, the picture at the top of README.md.

The shipped model prunes one of its evaluation pictures; the bars are rows of benchmarks/results. The file names the
numbers it shows, so that a test can tell when the rows have moved on.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIGURE = ROOT / "docs" / "pictures" / "before-after.png"
METHOD, KEEP = "divprune", 0.25
QUESTION = 6
"""Of the evaluation questions; one with several objects, so that there is something to see."""
GREY, BLUE = "#9aa0a6", "#3949ab"


def numbers() -> dict[str, tuple[float, float]]:
    """Unpruned and pruned: visual tokens, milliseconds to the first token, KV cache in MiB, right answers in per cent.

    Time and cache are those of the profile's batch of 8 prompts; answers leave `count` out, as everywhere.
    """
    before, after = (
        _row("profile_cpu", method, keep, model="tinyvlm") for method, keep in (("none", 1), (METHOD, KEEP))
    )
    answers = [
        100 * float(_row("accuracy_tinyvlm", method, keep, type="mean_without_count", positions="original")["answer"])
        for method, keep in (("none", 1), (METHOD, KEEP))
    ]
    return {
        "visual tokens": (float(before["kept_tokens"]), float(after["kept_tokens"])),
        "first token, ms": (float(before["ttft_ms"]), float(after["ttft_ms"])),
        "KV cache, MiB": (float(before["cache_mib"]), float(after["cache_mib"])),
        "right answers, %": (answers[0], answers[1]),
    }


def _row(file: str, method: str, keep: float, **wanted: str) -> dict[str, str]:
    """The first such row: the pruned one and the unpruned one that it took turns with."""
    with (ROOT / "benchmarks" / "results" / f"{file}.csv").open() as rows:
        for row in csv.DictReader(rows):
            if row["method"] == method and float(row["keep"]) == keep and wanted.items() <= row.items():
                return row
    raise ValueError(f"{file}.csv has no row of {method} at keep={keep} with {wanted}")


def pictures() -> list[tuple[Any, str]]:
    """The picture and what of it stays, each with the question and the answer that the model gave."""
    import vtc
    import vtc_tinyvlm
    from vtc.viz import overlay

    model, processor = vtc_tinyvlm.load()
    question = vtc_tinyvlm.evaluation_questions(QUESTION + 1)[QUESTION]
    inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")

    def answer() -> str:
        (ids,) = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
        asked = question.prompt.removeprefix(processor.image_token).strip()
        return f"{asked} {processor.decode(ids, skip_special_tokens=True)}"

    whole = answer()
    with vtc.patch(model, METHOD, keep=KEEP) as pruned:
        short = answer()
    kept = overlay(question.image, pruned.last_keep[0][0], pruned.last_layouts[0][0])
    return [(question.image, whole), (kept, short)]


def draw() -> None:
    """Write the file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    shown = numbers()
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 3.4), width_ratios=(1, 1, 1.75), layout="constrained", dpi=110
    )
    tokens = [round(count) for count in shown["visual tokens"]]
    for axes, (picture, answer), count in zip((left, middle), pictures(), tokens, strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(f"{count} visual tokens", fontsize=11)
        axes.set_xlabel(answer, fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for place, (name, (before, after)) in enumerate(shown.items()):
        right.barh(place - 0.19, 1, 0.36, color=GREY)
        right.barh(place + 0.19, after / before, 0.36, color=BLUE)
        digits = 0 if name == "visual tokens" else 1
        right.text(1.02, place - 0.19, f"{before:.{digits}f}", va="center", fontsize=10, color="#555")
        right.text(after / before + 0.02, place + 0.19, f"{after:.{digits}f}", va="center", fontsize=10, color=BLUE)
    right.set_yticks(range(len(shown)), shown, fontsize=11)
    right.set(xlim=(0, 1.16), xticks=[])
    right.invert_yaxis()
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    figure.get_layout_engine().set(wspace=0.06)
    right.set_title(f'unpruned, and vtc.patch(model, "{METHOD}", keep={KEEP})', fontsize=10, loc="right")
    figure.savefig(FIGURE, metadata={"Description": json.dumps(shown), "Software": None})


if __name__ == "__main__":
    draw()
