"""What a verification found, as an object that prints itself as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["ok", "FAILED", "upstream"]
"""``upstream``: the unpruned model departs from its own forward pass in the same way, so the fault is not vtc's."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what was compared.
        verdict: how it ended.
        difference: the largest absolute difference of two logits; ``None`` where none were compared.
        tolerance: how large it might have been.
        agree: greedy tokens that are the same.
        decided: greedy tokens that had to be: where the best logit by hand leads by more than twice the tolerance.
        tokens: greedy tokens in all.
        note: what there is to say about it.
    """

    name: str
    verdict: Verdict
    difference: float | None = None
    tolerance: float | None = None
    agree: int = 0
    decided: int = 0
    tokens: int = 0
    note: str = ""

    @property
    def row(self) -> tuple[str, ...]:
        """Its line of the table."""
        close = f" ({self.tokens - self.decided} too close to call)" if self.decided < self.tokens else ""
        return (
            self.name,
            "-" if self.difference is None else f"{self.difference:.1e}",
            "-" if self.tolerance is None else f"{self.tolerance:.1e}",
            f"{self.agree} of {self.decided}{close}" if self.tokens else "-",
            self.verdict,
        )


COLUMNS = ("check", "largest difference", "tolerance", "tokens agree", "verdict")


@dataclass(frozen=True)
class Verification:
    """What :func:`vtc.verify` found; its ``repr`` is a table.

    Attributes:
        subject: what was verified: class, model type, method, dtype, device.
        checks: what was compared.
    """

    subject: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check is ok."""
        return bool(self.checks) and all(check.verdict == "ok" for check in self.checks)

    @property
    def verdict(self) -> Verdict:
        """``FAILED`` if a check is, or none is ok; ``upstream`` if vtc is right wherever the model itself is."""
        verdicts = {check.verdict for check in self.checks}
        return "FAILED" if "FAILED" in verdicts or "ok" not in verdicts else "ok" if self.ok else "upstream"

    @property
    def difference(self) -> float | None:
        """That of :attr:`worst`."""
        return None if self.worst is None else self.worst.difference

    @property
    def worst(self) -> Check | None:
        """The comparison of logits with the largest difference, if one came to that."""
        compared = [check for check in self.checks if check.tokens]
        return max(compared, key=lambda check: check.difference or 0.0, default=None)

    @property
    def faults(self) -> list[str]:
        """What is not ok, a sentence each."""
        return [f"{check.name}: {check.note}" for check in self.checks if check.verdict != "ok"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"subject": self.subject, "ok": self.ok, "checks": [vars(check) for check in self.checks]}

    def __repr__(self) -> str:
        notes = [f"{check.name}: {check.note}" for check in self.checks if check.note]
        return "\n".join([f"{self.subject}: {self.verdict}", *table(COLUMNS, [c.row for c in self.checks]), *notes])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text with aligned columns."""
    widths = [max(map(len, cells)) for cells in zip(header, *rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)]
