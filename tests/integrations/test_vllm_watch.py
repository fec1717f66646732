"""An engine's self-check, and what is looked up in vLLM's sources; without vLLM."""

import pytest
import torch

from vtc_vllm import positions, upstream
from vtc_vllm.watch import Place, Watch, unpruned

IMAGE = 9
IDS = [1, *[IMAGE] * 3, 5, *[IMAGE] * 2, 6, 7]
PLACES = [Place(1, 3, 6), Place(5, 2, 6)]
KEPT = [[0, 2, 5], [1, 3]]


def grid(rows):
    """Six tokens of an image, from where it begins: in a row, or 2 x 3."""
    index = torch.arange(6)
    return index[:, None] if rows == 1 else torch.stack([0 * index, index // 3, index % 3], 1)


def whole(rows):
    """Positions of the unpruned prompt, by hand."""
    if rows == 1:
        return torch.arange(16)[None], 16
    found, at = [torch.zeros(3, 1)], 1
    for text in (1, 2):
        found += [grid(3).T + at, torch.arange(text).expand(3, text) + at + 3]
        at += 3 + text
    return torch.cat(found, 1).long(), at


def run(rows, chunk=9, spoil=lambda now: now, carried=lambda now: now, off=0, others=4):
    """A prompt in chunks through our positions and a runner that carries them beside those of another prompt."""
    watch = Watch(rows)
    expected, following = whole(rows)
    watch.prompt(IDS, PLACES, expected, following)
    extent = 6 if rows == 1 else 3
    now, _ = positions.provisional(9, [positions.Span(p.start, p.kept, extent) for p in PLACES], rows)
    offsets = {p.start + j: grid(rows)[i] for p, kept in zip(PLACES, KEPT, strict=True) for j, i in enumerate(kept)}
    media = torch.tensor(IDS) == IMAGE
    for start in range(0, 9, chunk):
        end = min(start + chunk, 9)
        here = [offsets[i] for i in range(start, end) if i in offsets]
        before = now
        if here:
            now, delta = positions.filled(now, media, torch.stack(here), start, rows)
            now = spoil(now)
            watch.chunk(torch.tensor(IDS), now, delta + off, len(here), start)
        step = torch.full((3, others), 40)
        watch.forward(torch.cat([step, carried(now if carried is not None else before)[:, start:end], step], 1))
    return watch


@pytest.mark.parametrize("chunk", [9, 4, 2, 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_right_positions_pass_in_any_chunks(rows, chunk, caplog):
    with caplog.at_level("INFO"):
        watch = run(rows, chunk)
    assert watch.done
    assert caplog.text.count("self-check passed: 12 -> 5 visual tokens") == 1


def changed(now, column, value, row=slice(None)):
    now = now.clone()
    now[row, column] = value
    return now


def swapped(now):
    return now[:, [0, 2, 1, *range(3, 9)]]


def compact(now):
    return torch.arange(9).expand(3, 9)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"spoil": lambda now: changed(now, 4, 3)}, "text at"),
        ({"spoil": lambda now: changed(now, 1, 7)}, "an image's tokens at"),
        ({"spoil": swapped}, "an image's tokens at"),
        ({"spoil": compact}, "found"),
        ({"off": 1}, "decoding goes on at"),
        ({"carried": compact}, "in the language model"),
        ({"carried": lambda now: changed(now, 6, -4)}, "in the language model"),
        ({"carried": lambda now: changed(now, 0, 1, 0)}, "in the language model"),
    ],
    ids=["text", "image", "order", "compact", "decode", "not carried", "not written", "one axis"],
)
def test_each_wrong_one_is_told(rows, how, said):
    with pytest.raises(RuntimeError, match=said):
        run(rows, **how)


def test_a_vllm_that_never_asks_is_told():
    watch = Watch(1)
    watch.prompt(IDS, PLACES, *whole(1))
    watch.forward(torch.arange(9))  # another prompt's step
    now, _ = positions.provisional(9, [positions.Span(p.start, p.kept, 6) for p in PLACES], 1)
    with pytest.raises(RuntimeError, match="image tokens without positions"):
        watch.forward(now)


def test_other_prompts_are_not_taken_for_it():
    watch = Watch(1)
    watch.prompt(IDS, PLACES, *whole(1))
    watch.chunk([2, *IDS[1:]], compact(None), 0, 5, 0)
    watch.chunk(IDS, compact(None), 0, 0, 0)  # a decode step
    watch.forward(torch.full((3, 9), 7))
    watch.prompt([1, 2, 3], [], torch.arange(3)[None], 3)
    watch.forward(torch.arange(3))
    assert not watch.done


def test_the_unpruned_prompt():
    ids, starts = unpruned(IDS, PLACES)
    assert ids == [1, *[IMAGE] * 6, 5, *[IMAGE] * 6, 6, 7]
    assert starts == [1, 8]


# ------------------------------------------------------------------------------------------------------ vLLM's sources

SOURCE = """
NAMED = {}
ANNOTATED: dict[str, int] = {}
class Base(Protocol):
    field: int = 0
    @property
    def derived(self): ...
    def method(self, first, *, second=None): self.model.asked(given=first, more=second)
def function(one): ...
"""


@pytest.mark.parametrize(
    ("need", "there"),
    [
        ("NAMED", True),
        ("ANNOTATED", True),
        ("Base", True),
        ("Base.field", True),
        ("Base.derived()", True),
        ("Base.method(first, second)", True),
        ("function(one)", True),
        ("calls asked(given)", True),
        ("calls asked(given, more)", True),
        ("Named", False),
        ("Other.field", False),
        ("Base.other", False),
        ("Base.field()", False),
        ("Base.method(third)", False),
        ("function(two)", False),
        ("function(one, two)", False),
        ("calls asked(other)", False),
        ("calls method()", False),
    ],
)
def test_what_is_looked_up(tmp_path, monkeypatch, need, there):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "__init__.py").write_text(SOURCE)
    monkeypatch.setattr(upstream, "NEEDS", {"vllm.inside": (need,)})
    upstream.missing.cache_clear()
    assert upstream.missing(tmp_path) == (() if there else (f"vllm.inside: {need}",))


def test_a_vllm_with_other_insides_is_refused(tmp_path, monkeypatch):
    upstream.missing.cache_clear()
    assert set(upstream.missing(tmp_path)) == set(upstream.NEEDS)  # an empty folder has none of the modules
    monkeypatch.setattr(upstream, "missing", lambda: ("vllm.one: A.b(c)", "vllm.two"))
    with pytest.raises(ValueError, match=r"missing: vllm.one: A.b\(c\); vllm.two. What works: vLLM 0.32"):
        upstream.check()
