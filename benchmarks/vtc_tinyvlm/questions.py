"""Questions about a scene, and their only right answer.

Six types. Every question is unambiguous by construction: `enumerate_questions` lists only those whose answer follows
from the scene without a judgement call, and `sample_questions` draws from them.

The relation type is defined by sectors. Object X lies *left of* Y when it is further left than it is above or below:
`dx = x_X - x_Y < 0` and `|dx| - |dy| >= 8` pixels (one patch), centre to centre; the other three directions
likewise. A pair with `||dx| - |dy|| < 8` is diagonal. "what is left of the circle ?" asks for the shape of the first
object in that sector, "nothing" if there is none. It is asked only if the scene has at least three objects, and if
every rival (another object in the sector, or a diagonal one on that side) is at least 8 pixels further along the axis
than the answer. The circle is "the red circle" in scenes with several circles of which one is red.

Two shortcuts would answer many such questions: naming the outermost object on that side, and naming whatever is
closest in that half of the image. `sample_questions` therefore prefers, half of the time, questions on which the
outermost object is the wrong answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scenes import COLOR_NAMES, SHAPES, Object, Scene

TYPES = ("color", "shape", "count", "digit", "rel", "exist")
MARGIN = 8
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class TextQuestion:
    """A question without its image. `referent` and `target` are object indices, -1 where there is no single one:
    the object the question names, and the object whose property is the answer (training-only grounding labels).
    """

    type: str
    text: str
    answer: str
    referent: int = -1
    target: int = -1


def enumerate_questions(scene: Scene, kind: str) -> list[TextQuestion]:
    """All valid questions of one type about the scene (for `exist`: those answered yes)."""
    return _ENUMERATE[kind](scene.objects)


def sample_questions(scene: Scene, kinds: list[str], rng: np.random.Generator) -> list[TextQuestion]:
    """One question per entry of `kinds`, without repeats while the scene has enough. A type that the scene cannot ask
    (no unique referent, say) falls back to `digit` and then to `exist`, which every scene can. Answers of `rel` are
    balanced here.
    """
    pools: dict[str, list[TextQuestion]] = {}
    chosen = []
    for kind in kinds:
        pool: list[TextQuestion] = []
        for attempt in (kind, "digit"):
            if attempt == "exist":
                break
            if not pools.get(attempt):
                pools[attempt] = enumerate_questions(scene, attempt)
            pool = pools[attempt]
            if attempt == "rel":
                pool = _balance_relations(scene.objects, pool, rng)
            if pool:
                break
        if not pool:
            chosen.append(_sample_exist(scene.objects, rng))
            continue
        question = pool[rng.integers(len(pool))]
        pools[question.type] = [q for q in pools[question.type] if q is not question]
        chosen.append(question)
    return chosen


def sector(reference: Object, other: Object) -> str | None:
    """The direction in which `other` lies seen from `reference`, or None when the pair is diagonal."""
    dx, dy = other.x - reference.x, other.y - reference.y
    if abs(dx) - abs(dy) >= MARGIN:
        return "right of" if dx > 0 else "left of"
    if abs(dy) - abs(dx) >= MARGIN:
        return "below" if dy > 0 else "above"
    return None


def _unique(objects: tuple[Object, ...], attribute: str) -> list[int]:
    values = [getattr(o, attribute) for o in objects]
    return [i for i, v in enumerate(values) if values.count(v) == 1]


def _colors(objects: tuple[Object, ...]) -> list[TextQuestion]:
    return [
        TextQuestion("color", f"what color is the {objects[i].shape_name} ?", objects[i].color_name, i, i)
        for i in _unique(objects, "shape")
    ]


def _shapes(objects: tuple[Object, ...]) -> list[TextQuestion]:
    return [
        TextQuestion("shape", f"what shape is the {objects[i].color_name} object ?", objects[i].shape_name, i, i)
        for i in _unique(objects, "color")
    ]


def _digits(objects: tuple[Object, ...]) -> list[TextQuestion]:
    pairs = [(o.color, o.shape) for o in objects]
    return [
        TextQuestion("digit", f"what digit is on the {o.color_name} {o.shape_name} ?", str(o.digit), i, i)
        for i, o in enumerate(objects)
        if pairs.count(pairs[i]) == 1
    ]


def _counts(objects: tuple[Object, ...]) -> list[TextQuestion]:
    present = sorted({o.color for o in objects})
    absent = [c for c in range(len(COLOR_NAMES)) if c not in present][:: max(1, len(present))][:2]
    questions = [TextQuestion("count", "how many objects are there ?", str(len(objects)))] * 2
    for color in present + absent:
        number = sum(o.color == color for o in objects)
        questions.append(TextQuestion("count", f"how many {COLOR_NAMES[color]} objects are there ?", str(number)))
        if number > 1:  # else nearly every colour count would be 1
            questions.append(questions[-1])
    return questions


def _relations(objects: tuple[Object, ...]) -> list[TextQuestion]:
    if len(objects) < 3:  # with a single other object the question would be half answered by the scene's content
        return []
    questions = []
    unique, pairs = _unique(objects, "shape"), [(o.color, o.shape) for o in objects]
    for i, reference in enumerate(objects):
        if pairs.count(pairs[i]) > 1:
            continue
        name = reference.shape_name if i in unique else f"{reference.color_name} {reference.shape_name}"
        others = [j for j in range(len(objects)) if j != i]
        sectors = {j: sector(reference, objects[j]) for j in others}
        for direction, (ux, uy) in DIRECTIONS.items():
            along = {j: (objects[j].x - reference.x) * ux + (objects[j].y - reference.y) * uy for j in others}
            inside = [j for j in others if sectors[j] == direction]
            diagonal = [j for j in others if sectors[j] is None and along[j] > 0]
            target = min(inside, key=along.__getitem__, default=-1)
            nearest = along.get(target, 0)
            if any(along[j] < nearest + MARGIN for j in inside + diagonal if j != target) or (target < 0 and diagonal):
                continue
            answer = objects[target].shape_name if inside else "nothing"
            text = f"what is {direction} the {name} ?"
            questions.append(TextQuestion("rel", text, answer, i, target))
    return questions


def _balance_relations(
    objects: tuple[Object, ...], pool: list[TextQuestion], rng: np.random.Generator
) -> list[TextQuestion]:
    """Narrow the pool so that a quarter of the answers are "nothing" and shortcuts often fail (module docstring).

    Empty when only "nothing" is left: padding with it would make it the most likely answer.
    """
    something = [q for q in pool if q.answer != "nothing"]
    nothing = [q for q in pool if q.answer == "nothing"]
    pool = nothing if nothing and something and rng.random() < 0.25 else something
    hard = [q for q in pool if _outermost(objects, q) != q.target]
    return hard if hard and rng.random() < 0.5 else pool


def _outermost(objects: tuple[Object, ...], question: TextQuestion) -> int:
    """What the shortcut answers: the outermost object on that side, -1 ("nothing") if that is the referent."""
    ux, uy = next(unit for name, unit in DIRECTIONS.items() if f" {name} " in question.text)
    best = max(range(len(objects)), key=lambda i: objects[i].x * ux + objects[i].y * uy)
    return -1 if best == question.referent else best


def _exists(objects: tuple[Object, ...]) -> list[TextQuestion]:
    return [
        TextQuestion("exist", f"is there a {o.color_name} {o.shape_name} ?", "yes", i, i) for i, o in enumerate(objects)
    ]


def _sample_exist(objects: tuple[Object, ...], rng: np.random.Generator) -> TextQuestion:
    """Half yes; most of the no's are hard: colour and shape are both in the scene, on different objects."""
    if rng.random() < 0.5:
        pool = _exists(objects)
        return pool[rng.integers(len(pool))]
    pairs = {(o.color, o.shape) for o in objects}
    hard = sorted({(a.color, b.shape) for a in objects for b in objects} - pairs)
    if hard and rng.random() < 0.7:
        color, shape = hard[rng.integers(len(hard))]
    else:
        while True:
            color, shape = int(rng.integers(len(COLOR_NAMES))), int(rng.integers(len(SHAPES)))
            if (color, shape) not in pairs:
                break
    return TextQuestion("exist", f"is there a {COLOR_NAMES[color]} {SHAPES[shape]} ?", "no")


_ENUMERATE = {
    "color": _colors,
    "shape": _shapes,
    "count": _counts,
    "digit": _digits,
    "rel": _relations,
    "exist": _exists,
}
