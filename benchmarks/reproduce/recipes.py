"""The headline of each paper, as data: the command, the numbers expected, and how far off they may be.

Numbers are the papers' (see the docstrings in vtc/methods/). Left out of every recipe are benchmarks that lmms-eval
judges with an API (MMBench, MMBench-CN) and TextVQA for LLaVA models, which their papers prompt with recognised text.
"""

from __future__ import annotations

from dataclasses import dataclass

MQT_LLAVA = "mqt-llava"
"""What `vtc convert mqt` made of gordonhu/MQT-LLaVA-7b: a local folder."""
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

_SHARED = (_GQA, _POPE, _SQA, ("mme", "mme_perception_score"))
_SOME = "four of the benchmarks that the average is over"
_VQA = ("vqav2_val", "exact_match")


def _kept(
    name: str, paper: str, percent: float, *pruning: str, pretrained: str = LLAVA_15, note: str = _SOME
) -> Recipe:
    """A published average: so many per cent of the unpruned accuracy are kept."""
    base = "qwen2_5_vl" if pretrained == QWEN else "llava_hf"
    return Recipe(name, paper, base, pretrained, pruning, retention=Retention(percent, _SHARED), note=note)


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
    _kept(
        "fastervlm", "FasterVLM, arXiv 2412.01818, as re-run by ToDRE, 25 %", 96.0,
        "method=fastervlm", "keep=0.25", "positions=compact", pretrained=LLAVA_NEXT,
    ),
    _kept(
        "visionzip", "VisionZip, CVPR 2025, 64 tokens", 94.0,
        "method=visionzip", "keep=64", "positions=compact",
        note=_SOME + "; one patch more stands in for the CLS token",
    ),
    _kept(
        "vispruner", "VisPruner, ICCV 2025, 64 tokens, as re-run by RESTORE", 92.8,
        "method=vispruner", "keep=64", "method.released=true", "positions=compact",
    ),
    _kept("scope", "SCOPE, NeurIPS 2025, 64 tokens", 96.0, "method=scope", "keep=64", "positions=compact"),
    _kept(
        "holov", "HoloV, NeurIPS 2025, 64 tokens", 95.8, "method=holov", "keep=64", "positions=compact",
        note=_SOME + "; two re-runs by others, of its own code, are about 2.5 points below the paper",
    ),
    _kept(
        "hiprune", "HiPrune, ACL 2026, a third of the tokens", 99.3, "method=hiprune", "keep=192", "positions=compact",
    ),
    _kept(
        "vscan", "VScan, TMLR 2026, a tenth of the FLOPs", 95.4, "method=vscan", "keep=0.1667", "method.stage2=true",
        pretrained=LLAVA_NEXT, note=_SOME + "; the paper's own setting for LLaVA-NeXT is not known to us",
    ),
    _kept(
        "cdpruner", "CDPruner, NeurIPS 2025, 64 tokens", 97.0, "method=cdpruner", "keep=64", "positions=compact",
        note="of the paper with the relevance of the question, which lmms-eval cannot hand over: expect less",
    ),
    _kept(
        "cenprune", "Cen-Prune (DivPrune with it), 64 tokens", 96.2, "method=divprune", "keep=64",
        "method.centered=true", "positions=compact",
    ),
    _kept(
        "cenprune-qwen", "Cen-Prune (DivPrune with it), 20 %", 94.5, "method=divprune", "keep=0.2",
        "method.centered=true", pretrained=QWEN,
    ),
    Recipe(
        "prumerge", "LLaVA-PruMerge, ICCV 2025, untrained", "llava_hf", LLAVA_15,
        ("method=prumerge", "keep=0.25", "method.adaptive=true", "positions=compact"),
        (
            Expected(*_POPE, 70.7, None), Expected(*_SQA, 68.5, None), Expected(*_VQA, 65.9, None), _mme(1191, None),
        ),
        note="about 32 tokens, whatever keep says; without the extra token of the code",
    ),
    Recipe(
        "prumerge-plus", "LLaVA-PruMerge+, ICCV 2025, untrained, as run by AIM", "llava_hf", LLAVA_15,
        ("method=prumerge+", "keep=0.25", "method.adaptive=true", "positions=compact"),
        (
            Expected(*_GQA, 57.4, None), Expected(*_POPE, 82.2, None), Expected(*_VQA, 74.6, None), _mme(1392, None),
        ),
        note="about 144 tokens, whatever keep says",
    ),
    Recipe(
        "mqt", "MQT-LLaVA, NeurIPS 2024, 2 of 256 tokens", "llava_hf", MQT_LLAVA, ("method=mqt", "keep=2"),
        retention=Retention(97.0, (_SQA,)),
        note="first: vtc convert mqt MQT-LLaVA-7b mqt-llava --vision-tower clip-vit-large-patch14-336; the paper says "
        "a drop of 3 %",
    ),
    _kept(
        "fastv", "FastV, ECCV 2024, as re-run by ToDRE, 25 %", 95.4, "method=fastv", "keep=0.25",
        pretrained=LLAVA_NEXT,
    ),
    _kept(
        "pyramiddrop", "PyramidDrop, CVPR 2025, 46.6 % of the FLOPs", 100.0, "method=pyramiddrop", "keep=0.125",
        note="near lossless, says the paper; positions stay the original ones, the code renumbers them at every stage",
    ),
    _kept(
        "sparsevlm", "SparseVLM, ICML 2025, 192 tokens", 99.1, "method=sparsevlm", "keep=0.1961",
        note=_SOME + "; positions stay the original ones, v1 of the code renumbers them",
    ),
    _kept(
        "dart", "DART, EMNLP 2025, 64 tokens", 93.7, "method=dart", "keep=0.1112", "method.released=true",
    ),
)  # fmt: skip
"""One or two per paper. `chain`, `allocate`, `merge`, `adaptive`, `random` and `grid` are no paper's; of the methods
for videos none is here, since no model for videos of lmms-eval was tried with vtc."""
