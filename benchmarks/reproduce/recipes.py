"""The headline of each paper, as data: the command, the numbers expected, and how far off they may be.

Numbers are the papers' (see the docstrings in vtc/methods/). Left out of every recipe are benchmarks that lmms-eval
judges with an API (MMBench, MMBench-CN) and TextVQA for LLaVA models, which their papers prompt with recognised text.
"""

from __future__ import annotations

from dataclasses import dataclass

LLAVA_15, LLAVA_NEXT = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"
QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
POINTS, MME_POINTS = 1.5, 40.0
"""Tolerances, chosen and not measured: 1.5 points are above three binomial standard errors of GQA (12,578 questions)
and POPE (9,000), and one and a half of ScienceQA's images (2,017); MME perception is a sum of accuracies, out of 2000.
They also have to cover that the papers used other harnesses and versions."""


@dataclass(frozen=True)
class Expected:
    """One number of a paper, on lmms-eval's scale times ``scale``.

    Attributes:
        task: of lmms-eval.
        metric: of that task.
        pruned: published for the method.
        unpruned: published for the model as it is; ``None`` where the paper's is not known to us.
        tolerance: how far off a reproduction may be, for both.
        scale: what lmms-eval's value is multiplied with.
    """

    task: str
    metric: str
    pruned: float
    unpruned: float | None
    tolerance: float = POINTS
    scale: float = 100.0


@dataclass(frozen=True)
class Retention:
    """A mean of score / unpruned score, in per cent, over the tasks named by (task, metric)."""

    percent: float
    over: tuple[tuple[str, str], ...]
    tolerance: float = POINTS


@dataclass(frozen=True)
class Recipe:
    """How to repeat one headline.

    Attributes:
        name: of the recipe.
        paper: short reference.
        base: model id of lmms-eval.
        pretrained: the checkpoint on the hub.
        pruning: arguments of the model id ``vtc``.
        numbers: what to expect.
        retention: or the paper's average.
        note: what differs from the paper's own run.
    """

    name: str
    paper: str
    base: str
    pretrained: str
    pruning: tuple[str, ...]
    numbers: tuple[Expected, ...] = ()
    retention: Retention | None = None
    note: str = ""

    @property
    def tasks(self) -> list[str]:
        """All that must be run."""
        over = () if self.retention is None else self.retention.over
        return list(dict.fromkeys([*(n.task for n in self.numbers), *(task for task, _ in over)]))


def _mme(pruned: float, unpruned: float | None) -> Expected:
    return Expected("mme", "mme_perception_score", pruned, unpruned, MME_POINTS, 1.0)


_GQA, _POPE, _SQA = ("gqa", "exact_match"), ("pope", "pope_f1_score"), ("scienceqa_img", "exact_match")
_TODRE = (
    ("mme", "mme_perception_score"), _SQA, _GQA, _POPE, ("vizwiz_vqa_val", "exact_match"), ("vqav2_val", "exact_match"),
)  # fmt: skip
_TODRE_NOTE = "six of the paper's eight benchmarks; the paper's average is over all of them"
_SELECTOR = '{"importance":"selector_weights","options":{"path":"selector"}}'

RECIPES = (
    Recipe(
        "divprune", "DivPrune, CVPR 2025, table 1", "llava_hf", LLAVA_15,
        ("method=divprune", "keep=0.098", "positions=compact"),
        (
            Expected(*_GQA, 56.85, 61.96), Expected(*_POPE, 86.02, 85.84), Expected(*_SQA, 68.27, 69.41),
            Expected("seedbench", "seed_image", 59.47, 66.17), _mme(1328, 1506),
        ),
    ),
    Recipe(
        "divprune-next", "DivPrune, CVPR 2025", "llava_hf", LLAVA_NEXT,
        ("method=divprune", "keep=0.098", "positions=compact"),
        (Expected(*_GQA, 58.69, 64.28), Expected(*_POPE, 82.97, 86.38), _mme(1362, 1520)),
    ),
    Recipe(
        "todre-25", "ToDRE v2, arXiv 2505.18757", "llava_hf", LLAVA_NEXT,
        ("method=todre", "keep=0.25", "method.stage2=true"), retention=Retention(98.2, _TODRE), note=_TODRE_NOTE,
    ),
    Recipe(
        "todre-10", "ToDRE v2, arXiv 2505.18757", "llava_hf", LLAVA_NEXT,
        ("method=todre", "keep=0.1", "method.stage2=true"), retention=Retention(95.0, _TODRE), note=_TODRE_NOTE,
    ),
    Recipe(
        "idpruner", "IDPruner, arXiv 2602.13315, main table at 25 %", "qwen2_5_vl", QWEN,
        ("method=idpruner", "keep=0.25", f"method.importance={_SELECTOR}"),
        (
            Expected("ai2d", "exact_match", 80.51, 82.48), Expected("chartqa", "relaxed_overall", 74.32, 83.68),
            Expected("docvqa_val", "anls", 93.16, 94.90), _mme(1695, 1702), Expected("mmstar", "average", 56.49, 61.88),
            Expected("ocrbench", "ocrbench_accuracy", 74.0, 85.3), Expected(*_POPE, 87.06, 87.8),
            Expected(*_SQA, 85.52, 88.45), Expected("textvqa_val", "exact_match", 80.83, 82.74),
        ),
        note="first: hf download AngelSlim/Qwen2.5-VL-7B-Instruct-Selector --local-dir selector",
    ),
    Recipe(
        "transprune", "TransPrune-High, CVPR 2026, arXiv 2507.20630", "llava_hf", LLAVA_15,
        ("method=transprune", "keep=0.125"),
        (
            Expected(*_GQA, 61.4, None), Expected(*_POPE, 85.0, None), Expected(*_SQA, 69.5, None),
            Expected("vqav2_val", "exact_match", 77.9, None), _mme(1540, None),
        ),
        note="positions stay the original ones, the code renumbers them at every stage; VQAv2 on val, not test-dev",
    ),
    Recipe(
        "globalcom2-25", "GlobalCom2, AAAI 2026, arXiv 2501.05179", "llava_hf", LLAVA_NEXT,
        ("method=globalcom2", "keep=0.25", "positions=compact"),
        (Expected(*_GQA, 61.5, None), Expected(*_POPE, 87.6, None), _mme(1493.5, None)),
    ),
    Recipe(
        "globalcom2-10", "GlobalCom2, AAAI 2026, arXiv 2501.05179", "llava_hf", LLAVA_NEXT,
        ("method=globalcom2", "keep=0.1", "positions=compact"),
        (Expected(*_GQA, 57.1, None), Expected(*_POPE, 83.8, None), _mme(1365.5, None)),
    ),
)  # fmt: skip
"""One or two per paper. `chain`, `allocate`, `random` and `grid` are no paper's."""
