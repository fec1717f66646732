"""What ``vtc doctor`` examines: this environment, and :func:`vtc.verify` on a checkpoint or a tour of tiny models.

The proofs of the kernels are in :mod:`vtc.checking.kernels`.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vtc.checking.result import Verification
from vtc.checking.verify import one_line, verify
from vtc.models import UnsupportedModelError, list_models, resolve
from vtc.ops.backend import backend
from vtc.ops.proof import Outcome
from vtc.profiling.provenance import provenance

Verdict = Literal["ok", "FAILED", "upstream", "refused", "absent"]

QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Finding:
    """One model.

    Attributes:
        name: a checkpoint or a family.
        verdict: how it ended. ``absent``: this transformers does not know the family; ``refused``: the method is not
            for it; ``upstream``: see :mod:`vtc.checking.result`.
        seconds: that it took.
        model_type: of its config.
        attention: implementation in the language model.
        verification: what was compared, if it came to that.
        error: what was raised instead, as one line.
    """

    name: str
    verdict: Verdict
    seconds: float
    model_type: str
    attention: str = "-"
    verification: Verification | None = None
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """What is not as it should be, a line each."""
        return [self.error] if self.error else [] if self.verification is None else self.verification.faults

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"verification": None if self.verification is None else self.verification.as_dict()}


@dataclass(frozen=True)
class Patient:
    """A model to examine: its name, its model type, and how to get it and its inputs (which is when it may fail)."""

    name: str
    model_type: str
    prepare: Callable[[], tuple[nn.Module, Any]]


def environment(device: str) -> dict[str, str]:
    """Versions, the device, and which implementation of the ops runs on it; all as text.

    Raises:
        ValueError: ``VTC_BACKEND`` has an unknown value.
        RuntimeError: it asks for what cannot run here.
    """
    known = provenance(device)
    chosen = backend(torch.device(device))
    kernels = "yes" if chosen == "triton" else "no: selection and attention rows run in torch"
    versions = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    versions |= {name: known[name] for name in ("torch", "transformers", "triton", "vtc", "device", "driver", "commit")}
    return versions | {"backend": chosen, "Triton kernels in use": kernels}


def checkpoint(name: str, device: str = "cpu", dtype: str = "auto", shown: str | None = None) -> Patient:
    """A checkpoint with its processor and a synthetic picture.

    Args:
        name: a local folder or a name on the hub; loaded here and now.
        device: as for :meth:`vtc.checkpoint.Checkpoint.load`.
        dtype: as for :meth:`vtc.checkpoint.Checkpoint.load`.
        shown: what to call it; its own name otherwise.

    Raises:
        OSError: there is no such checkpoint.
    """
    from vtc.checkpoint import Checkpoint

    loaded = Checkpoint.load(name, device=device, dtype=dtype)
    model_type = str(getattr(loaded.model.config, "model_type", "-"))
    return Patient(shown or name, model_type, lambda: (loaded.model, loaded.encode(picture(), QUESTION)))


def tour(device: str = "cpu") -> list[Patient]:
    """The shipped model, then a tiny random model of every family that has one."""
    from vtc.zoo import FAMILIES

    def shipped() -> tuple[nn.Module, Any]:
        import vtc_tinyvlm

        return checkpoint(str(vtc_tinyvlm.CHECKPOINT), device).prepare()

    families = [name for name in list_models() if name in FAMILIES]
    return [Patient("tinyvlm (shipped)", "llava", shipped), *(_random(name, device) for name in families)]


def _random(name: str, device: str) -> Patient:
    from vtc.zoo import get_model, make_batch

    def prepare() -> tuple[nn.Module, Any]:
        inputs = {key: value.to(device) for key, value in make_batch(name, (1,)).items()}
        model: Any = get_model(name)
        return model.to(device), inputs

    return Patient(name, name, prepare)


def picture(width: int = 448, height: int = 336) -> Any:
    """A picture that no two of its patches share: colours that run across it, discs and noise."""
    from PIL import Image

    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    pixels = torch.stack([x, y, 1 - x * y])
    for at, (across, down) in enumerate([(0.25, 0.3), (0.7, 0.4), (0.5, 0.8)]):
        pixels[at, ((x - across) ** 2 + (y - down) ** 2) < 0.02] = 1.0
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
    bytes_ = ((0.8 * pixels + 0.2 * noise) * 255).byte().permute(1, 2, 0)
    return Image.fromarray(bytes_.contiguous().numpy())


def examine(patients: list[Patient], method: Any = "divprune", **options: Any) -> Iterator[Finding]:
    """Verify one model after the other; whatever one raises becomes its finding.

    Args:
        patients: the models.
        method: as for :func:`vtc.verify`.
        **options: as for :func:`vtc.verify`.
    """
    from transformers import CONFIG_MAPPING

    for patient in patients:
        if patient.model_type not in CONFIG_MAPPING:
            yield Finding(patient.name, "absent", 0.0, patient.model_type)
            continue
        start, attention, result, error = time.perf_counter(), "-", None, ""
        verdict: Verdict = "FAILED"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a deprecation is no finding, and there would be one for each model
                model, inputs = patient.prepare()
                attention = resolve(model)[1].attention
                result = verify(model, inputs, method, **options)
                verdict = result.verdict
        except Exception as raised:
            error = one_line(raised)
            if attention != "-" and isinstance(raised, ValueError) and not isinstance(raised, UnsupportedModelError):
                verdict = "refused"
        took = time.perf_counter() - start
        yield Finding(patient.name, verdict, took, patient.model_type, attention, result, error)


def is_right(findings: list[Finding], proofs: Sequence[Outcome] = ()) -> bool:
    """Whether something was verified, and nothing failed, no kernel either."""
    verdicts = {finding.verdict for finding in findings}
    return "ok" in verdicts and "FAILED" not in verdicts and not any(proof.reason for proof in proofs)


def issue(environment: dict[str, str], findings: list[Finding], proofs: Sequence[Outcome] = ()) -> str:
    """What to paste into an issue: versions, and what differs from what it should be; empty where nothing does."""
    wrong = [finding for finding in findings if finding.verdict == "FAILED"]
    untrue = [proof for proof in proofs if proof.reason]
    if not wrong and not untrue:
        return ""
    lines = [f"vtc doctor: {len(wrong)} of {len(findings)} models FAILED"]
    lines += [f"{len(untrue)} of {len(proofs)} kernels FAILED"] if untrue else []
    lines += [f"  {proof.name}: {proof.reason}" for proof in untrue]
    lines += [f"{name}: {value}" for name, value in environment.items()]
    for finding in wrong:
        largest = None if finding.verification is None else finding.verification.difference
        lines.append(
            f"{finding.name}: model type {finding.model_type}, attention {finding.attention}, largest difference "
            + ("none measured" if largest is None else f"{largest:.1e}")
        )
        lines += [f"  {fault}" for fault in finding.faults]
    return "\n".join(lines)
