"""What a run of lmms-eval answered, sample by sample, read from the log that `--log_samples` leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from vtc.profiling.exam import fingerprint

Said = Mapping[tuple[str, str], str]
"""(task, document) → a fingerprint of the answer."""


def read(results: Path) -> dict[tuple[str, str], str]:
    """The answers that were logged beside a result file, after the task's own filters.

    Args:
        results: ``..._results.json``.

    Raises:
        ValueError, KeyError: a log that is none of lmms-eval's.
    """
    began = results.name.removesuffix("results.json")
    said: dict[tuple[str, str], str] = {}
    for log in sorted(results.parent.glob(f"{began}samples_*.jsonl")):
        task = log.stem.removeprefix(f"{began}samples_")
        for line in log.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            answer = sample["filtered_resps"]
            text = answer if isinstance(answer, str) else json.dumps(answer)
            said[task, str(sample["doc_id"])] = fingerprint(text)
    return said


def loyalty(said: Said, unpruned: Said) -> float | None:
    """The share of answers that are, word for word, the unpruned model's (EffiVLM-Bench, arXiv 2506.00479).

    Of the documents that both have; ``None`` where there are none.
    """
    both = said.keys() & unpruned.keys()
    return sum(said[each] == unpruned[each] for each in both) / len(both) if both else None
