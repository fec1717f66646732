"""One process against two: `python .ci/lmms_eval/two_processes.py FOLDER [--questions 24] [--method divprune]`.

Runs lmms-eval twice on the shipped scenes, on the CPU: alone, and in two processes that torchrun starts and gloo
connects, each of which patches a replica of its own. Ends with status 1 when an answer or a score differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vtc_lmms_eval import runs, scenes


def answers(folder: Path) -> dict[int, Any]:
    """What the model said, by question."""
    (log,) = folder.rglob("*_samples_*.jsonl")
    samples = map(json.loads, log.read_text().splitlines())
    return {sample["doc_id"]: sample["filtered_resps"] for sample in samples}


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--method", default="divprune")
    asked = parser.parse_args()
    tasks = asked.folder.absolute() / "scenes"
    scenes.write(tasks, asked.questions)
    (run,) = runs.plan([asked.method], ["0.25"], [], [scenes.TASK])
    outcomes = []
    for processes in (1, 2):
        settings = runs.Settings("llava_hf", str(tasks / "model"), "cpu", 1, processes, None, tasks, 1)
        outcomes.append(runs.execute(run, settings, asked.folder))
        print(f"{processes} process(es): {outcomes[-1].reason or outcomes[-1].numbers}")
    if any(outcome.reason for outcome in outcomes):
        sys.exit(1)
    one, two = (answers(outcome.folder) for outcome in outcomes)
    differ = [i for i in range(asked.questions) if one.get(i) != two.get(i)]
    print(f"{len(one)} and {len(two)} answers, {len(differ)} of {asked.questions} differ")
    sys.exit(bool(differ) or len(one) != asked.questions or outcomes[0].scores != outcomes[1].scores)


if __name__ == "__main__":
    main()
