"""A task that needs no hub: the scenes of the shipped model, as `vtc_scenes`.

`python -m vtc_lmms_eval.scenes FOLDER [--questions 600]` writes the task (for `--include_path FOLDER`), its data, and
the shipped checkpoint with the chat template that lmms-eval's chat models ask for. The questions are those of
``vtc_tinyvlm.evaluation_questions``; the scores those of ``vtc_tinyvlm``, one per type and their mean without `count`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

from vtc.names import folder_of

TASK = "vtc_scenes"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
"""Without BOS: lmms-eval hands what this wrote to a processor, which adds it. With vLLM it differs: vtc_vllm.chat."""
_YAML = """\
# Written by vtc_lmms_eval.scenes.
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: scenes.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function vtc_lmms_eval.scenes.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function vtc_lmms_eval.scenes.process_results
generation_kwargs:
  max_new_tokens: 3
  temperature: 0
  do_sample: false
metric_list:
{metrics}
metadata:
  version: 1.0
"""
_METRIC = """\
  - metric: {name}
    aggregation: {aggregation}
    higher_is_better: true
"""


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The picture."""
    return [doc["image"].convert("RGB")]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Scores of one answer: its word, and whether the model also stopped after it."""
    from vtc_tinyvlm import is_correct, is_exact

    right, exact = float(is_correct(results[0], doc["answer"])), float(is_exact(results[0], doc["answer"]))
    return {
        "answer": {"type": doc["type"], "score": right},
        "exact": {"type": doc["type"], "score": exact},
        f"answer_{doc['type']}": right,
    }


def headline(scores: list[dict[str, Any]]) -> float:
    """The mean over types of their means, `count` left out, as in benchmarks/accuracy.py."""
    from vtc_tinyvlm import TYPES

    of = {kind: [s["score"] for s in scores if s["type"] == kind] for kind in TYPES if kind != "count"}
    means = [sum(values) / len(values) for values in of.values() if values]
    return sum(means) / len(means)


def write(folder: Path, questions: int) -> None:
    """Write task, data and model.

    Raises:
        ValueError: not even one question.
    """
    from vtc_tinyvlm import TYPES, dataset

    if questions < 1:
        raise ValueError(f"--questions {questions} is not a number of questions")
    folder.mkdir(parents=True, exist_ok=True)
    dataset("evaluation", questions).to_parquet(folder / "scenes.parquet")
    names = {"answer": "!function vtc_lmms_eval.scenes.headline", "exact": "!function vtc_lmms_eval.scenes.headline"}
    names |= {f"answer_{kind}": "mean" for kind in TYPES}
    metrics = "".join(_METRIC.format(name=name, aggregation=how) for name, how in names.items())
    (folder / f"{TASK}.yaml").write_text(_YAML.format(task=TASK, metrics=metrics.rstrip("\n")), encoding="utf-8")
    write_model(folder / "model")


def write_model(folder: Path, name: str = "tinyvlm") -> None:
    """Write a shipped model with the chat template that lmms-eval's chat models ask for.

    Raises:
        OSError: parts of the model cannot be had.
    """
    shutil.copytree(folder_of(name), folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    import typer

    def main(folder: Path, questions: Annotated[int, typer.Option(min=1)] = 600) -> None:
        """Write the task `vtc_scenes` and a copy of the shipped model with a chat template into FOLDER."""
        write(folder, questions)
        typer.echo(f"--include_path {folder} --tasks {TASK}, pretrained={folder / 'model'}")

    typer.run(main)
