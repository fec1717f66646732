"""`vtc doctor`: is it right on this machine?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from vtc.commands.shared import (
    A_MODEL,
    Device,
    KeepText,
    MethodName,
    Options,
    Positions,
    build_config,
    clear_errors,
    numbers_table,
    pick_device,
)

if TYPE_CHECKING:
    from rich.console import Console

    from vtc.checking.doctor import Finding
    from vtc.ops.proof import Outcome

VERDICTS = {
    "ok": "[green]ok[/]",
    "FAILED": "[bold red]FAILED[/]",
    "upstream": "[yellow]upstream[/]",
    "refused": "[dim]refused[/]",
    "absent": "[dim]not in this transformers[/]",
}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help=f"A checkpoint: {A_MODEL}. Without one: tinyvlm and a tiny random model of every family."),
    ] = None,
    method: MethodName = "divprune",
    keep: KeepText = "0.5",
    option: Options = None,
    positions: Positions = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of MODEL: auto (as saved), float32 (the sharpest), bfloat16, float16.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, for scripts.")] = False,
) -> None:
    """Find out whether pruning is right on this machine, with these versions.

    Each model is pruned by vtc and by hand: alone and in a padded batch, with and without a cache. By hand means that
    the unpatched model's own decoder is given the columns that stay. Logits must agree within the rounding of the
    dtype, and greedy tokens where the best of them leads by more than that.

    On a GPU every Triton kernel is compared with torch first, in the usual dtypes and widths; each is listed.

    Verdicts: ok; FAILED, with a text for an issue; upstream: the unpruned model of this transformers departs from
    itself in the same way, so it is not vtc's fault; refused: the method is not for this model, or has stages inside
    the language model, which are not verified.

    Exit code: 0 if something was verified and nothing FAILED, no kernel either, else 1; 2 if it could not begin.
    """
    from rich.console import Console

    console = Console()
    with clear_errors():
        from transformers.utils import logging

        from vtc.checking import doctor as checking
        from vtc.checking import kernels

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        config, place = build_config(method, keep, option, positions), pick_device(device)
        try:
            around = checking.environment(place)
        except RuntimeError as error:  # VTC_BACKEND asks for what cannot run
            raise ValueError(str(error)) from None
        patients = checking.tour(place) if model is None else [checking.checkpoint(model, place, dtype)]
    findings, proofs = [], []
    with Console(stderr=True).status("verifying ...") as status:
        for proof in kernels.prove(place):
            proofs.append(proof)
            status.update(f"verifying ... {len(proofs)} kernels")
        for finding in checking.examine(patients, config):
            findings.append(finding)
            status.update(f"verifying ... {len(findings)} of {len(patients)} models")
    good = checking.is_right(findings, proofs)
    report = checking.issue(around, findings, proofs)
    if as_json:
        found = [finding.as_dict() for finding in findings]
        tried = [vars(proof) for proof in proofs]
        told = {"ok": good, "environment": around, "kernels": tried, "findings": found, "issue": report}
        typer.echo(json.dumps(told, indent=2))
    else:
        _print(console, around, proofs, findings, good)
        if report:
            console.print("\nTo report it, paste this into an issue of vtc:\n", style="bold")
            console.print(report, markup=False, highlight=False, soft_wrap=True)
    if not good:
        raise typer.Exit(1)


def _print(
    console: Console, around: dict[str, str], proofs: list[Outcome], findings: list[Finding], good: bool
) -> None:
    for name, value in (around | {"kernels": _kernels(proofs)}).items():
        console.print(f"{name:>21}  {value}", markup=False, highlight=False, soft_wrap=True)
    for proof in proofs:
        verdict = VERDICTS["FAILED" if proof.reason else "ok"]
        console.print(f"{verdict} ", f"{proof.seconds:5.1f} s  ", end="", highlight=False)
        console.print(
            proof.name + (proof.reason and f": {proof.reason}"), markup=False, highlight=False, soft_wrap=True
        )
    table = numbers_table(None, "model", "attention", "difference", "tolerance", "tokens", "verdict")
    for finding in findings:
        table.add_row(*_row(finding))
    console.print(table)
    if len(findings) == 1 and findings[0].verification is not None:
        console.print(repr(findings[0].verification) + "\n", markup=False, highlight=False, soft_wrap=True)
    for finding in findings:
        if finding.error or (finding.verdict == "upstream" and len(findings) > 1):
            for fault in finding.faults:
                console.print(f"{finding.name}: {fault}", markup=False, highlight=False, soft_wrap=True)
    console.print(_summary(findings, good), highlight=False)


def _kernels(proofs: list[Outcome]) -> str:
    if not proofs:
        return "nothing to prove: torch computes on this device"
    wrong = sum(bool(proof.reason) for proof in proofs)
    return (
        f"{wrong} of {len(proofs)} FAILED" if wrong else f"{len(proofs)} of {len(proofs)} compute what torch computes"
    )


def _row(finding: Finding) -> tuple[str, ...]:
    """Its largest difference with the tolerance of that check, and the greedy tokens of all checks."""
    verdict = VERDICTS[finding.verdict]
    result = finding.verification
    if result is None or (worst := result.worst) is None:
        return finding.name, finding.attention, "-", "-", "-", verdict
    agree, decided = sum(check.agree for check in result.checks), sum(check.decided for check in result.checks)
    numbers = f"{worst.difference:.1e}", f"{worst.tolerance:.1e}", f"{agree} of {decided}"
    return finding.name, finding.attention, *numbers, verdict


def _summary(findings: list[Finding], good: bool) -> str:
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in VERDICTS}
    examined = len(findings) - counts["absent"] - counts["refused"]
    parts = [f"{counts['ok']} of {examined} models are right"]
    if counts["upstream"]:
        parts.append(f"{counts['upstream']} where vtc is not to blame")
    if counts["refused"]:
        parts.append(f"{counts['refused']} that this method is not for")
    if count := counts["absent"]:
        parts.append(f"{count} {'family is' if count == 1 else 'families are'} not in this transformers")
    failed = f"{counts['FAILED']} FAILED" if counts["FAILED"] else "Not all is right"
    told = "[green]Pruning is right on this machine[/]: " if good else f"[bold red]{failed}[/]; "
    return told + "; ".join(parts)
