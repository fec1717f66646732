"""Questions about a scene, and their only right answer.

Each is listed only where the scene leaves no doubt: corners and sides where an object's centre is clear of the middle
line or of the other object's, names where a class stands there once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from .catalogue import CLASSES, UNCOUNTED, plural
from .charts import Chart
from .documents import Document
from .photos import SIZE, Photo, Thing
from .scenes import Scene

TYPES = ("exist", "count", "where", "rel", "leftmost", "sign", "field", "value", "color", "highest")
LEFT_OUT = ("count", "field", "color")
"""In no mean: counting by how much is left is misled by any pruning, and the others the model guesses (README.md)."""
ASKED = {
    Photo: ("exist", "count", "where", "rel", "leftmost", "sign"),
    Document: ("field",),
    Chart: ("value", "color", "highest"),
}
"""Which types a sort of scene can be asked."""
MIDDLE = 16
"""px between an object's centre and a middle line of the picture, at least, to say in which corner it is."""
APART = 24
"""px between two centres, at least, to say which is left of the other or above it."""


@dataclass(frozen=True)
class TextQuestion:
    """One question in words.

    Attributes:
        text: ends with a question mark.
        answer: one word or number.
        type: one of :data:`TYPES`.
        held: it turns on a cut-out that training never shows.
        named: (word of the text, x, y in px): where what is named in it stands in the picture; for training.
    """

    text: str
    answer: str
    type: str
    held: bool = False
    named: tuple[tuple[int, int, int], ...] = ()


def article(word: str) -> str:
    """``a`` or ``an``."""
    return "an" if word[0] in "aeiou" else "a"


def _ask(
    text: str, answer: str, kind: str, held: bool = False, at: Mapping[str, tuple[int, int]] = MappingProxyType({})
) -> TextQuestion:
    """``at`` says where words of the text stand in the picture."""
    words = text.split()
    return TextQuestion(text, answer, kind, held, tuple((words.index(word), x, y) for word, (x, y) in at.items()))


def _unique(scene: Photo) -> list[Thing]:
    words = [t.word for t in scene.things]
    return [t for t in scene.things if t.word is not None and words.count(t.word) == 1]


def exist(scene: Photo, rng: np.random.Generator) -> TextQuestion:
    """Yes and no half each, in the same words, every class as often with the one as with the other.

    A "no" asks for a class of the same group as one that is there, half of the time.
    """
    there = sorted({t.word for t in scene.things if t.word is not None})
    if rng.random() < 0.5:
        word = str(rng.choice(there))
        seen = [t for t in scene.things if t.word == word]
        at = {word: (seen[0].x, seen[0].y)} if len(seen) == 1 else {}
        return _ask(f"is there {article(word)} {word} ?", "yes", "exist", all(t.held for t in seen), at)
    absent = [w for w in CLASSES if w not in there]
    if rng.random() < 0.5:
        group = CLASSES[str(rng.choice(there))].group
        absent = [w for w in absent if CLASSES[w].group == group] or absent
    word = str(rng.choice(absent))
    return _ask(f"is there {article(word)} {word} ?", "no", "exist", any(t.held for t in scene.things))


def count(scene: Photo) -> list[TextQuestion]:
    """Of the first object's class, of which one, two or three were planned."""
    word = scene.things[0].word
    if word is None or word in UNCOUNTED:
        return []
    same = [t for t in scene.things if t.word == word]
    return [_ask(f"how many {plural(word)} are there ?", str(len(same)), "count", any(t.held for t in same))]


def corner(x: int, y: int) -> str | None:
    """Which of the four, ``None`` close to a middle line."""
    if min(abs(x - SIZE / 2), abs(y - SIZE / 2)) < MIDDLE:
        return None
    return ("top" if y < SIZE / 2 else "bottom") + ("left" if x < SIZE / 2 else "right")


def where(scene: Photo) -> list[TextQuestion]:
    """The corner of each object that stands there once."""
    return [
        _ask(f"in which corner is the {t.word} ?", found, "where", t.held, {str(t.word): (t.x, t.y)})
        for t in _unique(scene)
        if (found := corner(t.x, t.y)) is not None
    ]


def rel(scene: Photo) -> list[TextQuestion]:
    """Two objects: which is left or right, above or below."""
    found = []
    for a in _unique(scene):
        for b in _unique(scene):
            if a is b:
                continue
            held = a.held or b.held
            at = {str(a.word): (a.x, a.y), str(b.word): (b.x, b.y)}
            if abs(a.x - b.x) >= APART:
                side = "left" if a.x < b.x else "right"
                found.append(_ask(f"is the {a.word} left or right of the {b.word} ?", side, "rel", held, at))
            if abs(a.y - b.y) >= APART:
                side = "above" if a.y < b.y else "below"
                found.append(_ask(f"is the {a.word} above or below the {b.word} ?", side, "rel", held, at))
    return found


def leftmost(scene: Photo) -> list[TextQuestion]:
    """The name of what stands farthest to the left, if it stands clear of the next."""
    ordered = sorted(scene.things, key=lambda t: t.x)
    first = ordered[0]
    if first.word is None or (len(ordered) > 1 and ordered[1].x - first.x < APART):
        return []
    return [_ask("what is farthest left ?", first.word, "leftmost", first.held, {"left": (first.x, first.y)})]


def sign(scene: Photo) -> list[TextQuestion]:
    """The number on the sign, if there is one."""
    if scene.sign is None:
        return []
    return [_ask("what number is on the sign ?", scene.sign.number, "sign", at={"sign": (scene.sign.x, scene.sign.y)})]


def field(scene: Document) -> list[TextQuestion]:
    """The value of each key."""
    return [
        _ask(f"what is the {line.key} ?", line.value, "field", at={line.key: (line.value_x, line.y)})
        for line in scene.lines
    ]


def value(scene: Chart) -> list[TextQuestion]:
    """The value of each bar, by month and by colour."""
    found = []
    for bar in scene.bars:
        at = (bar.x, max(0, bar.top - scene.size // 2))
        found.append(_ask(f"what is the value of {bar.month} ?", str(bar.value), "value", at={bar.month: at}))
        found.append(_ask(f"what is the value of the {bar.color} bar ?", str(bar.value), "value", at={bar.color: at}))
    return found


def color(scene: Chart) -> list[TextQuestion]:
    """The colour of each month's bar."""
    return [
        _ask(f"what color is the bar of {bar.month} ?", bar.color, "color", at={bar.month: (bar.x, scene.base - 6)})
        for bar in scene.bars
    ]


def highest(scene: Chart) -> list[TextQuestion]:
    """Which month has the highest and which the lowest bar."""
    bars = sorted(scene.bars, key=lambda bar: bar.value)
    return [
        _ask(f"which month is {word} ?", bar.month, "highest", at={word: (bar.x, (bar.top + scene.base) // 2)})
        for word, bar in (("lowest", bars[0]), ("highest", bars[-1]))
    ]


def candidates(scene: Scene, kind: str, rng: np.random.Generator) -> list[TextQuestion]:
    """All questions of a type that a scene can be asked, none where it cannot."""
    if kind not in ASKED[type(scene)]:
        return []
    if kind == "exist":
        return [exist(scene, rng)]  # type: ignore[arg-type]
    listed = {"count": count, "where": where, "rel": rel, "leftmost": leftmost, "sign": sign}
    listed |= {"field": field, "value": value, "color": color, "highest": highest}  # type: ignore[dict-item]
    return listed[kind](scene)  # type: ignore[arg-type]


def sample_questions(scene: Scene, kinds: Sequence[str], rng: np.random.Generator) -> list[TextQuestion]:
    """One question for each of these types that the scene can be asked, none twice."""
    asked: list[TextQuestion] = []
    for kind in kinds:
        rest = [q for q in candidates(scene, kind, rng) if q.text not in {a.text for a in asked}]
        if rest:
            asked.append(rest[rng.integers(len(rest))])
    return asked
