"""What a reader is told first: how good a run is, and whether that can be believed."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from mwpb_fast.report.compare import attacked
from mwpb_fast.report.read import Attack, Result, Run
from mwpb_fast.system.units import counted

WORDS = {
    "ok": "Can be believed",
    "doubt": "In doubt",
    "open": "Not settled yet",
    "none": "Not evaluated yet",
}


@dataclass(frozen=True)
class Judgement:
    """level: ok, doubt, open or none, see WORDS. reasons: (level, line), the gravest first. headline: the result
    whose numbers stand first. robust, natural: of it."""

    level: str
    reasons: list[tuple[str, str]]
    headline: Result | None = None
    robust: Attack | None = None
    natural: Attack | None = None


def headline(run: Run, which: str = "best") -> Result | None:
    """The result that says most of the run's best checkpoint: of it as it is now, on all images, with AutoAttack,
    then the one with the lowest worst case; of the last checkpoint where there is none of the best."""
    found = [result for result in run.results if result.which == which]
    if not found:
        return headline(run, "last") if which == "best" else None

    def rank(result: Result) -> tuple[bool, bool, bool, float]:
        worst = result.worst.accuracy if result.worst else 100.0
        return bool(result.stale), result.preview, not _autoattack(result), worst

    return min(found, key=rank)


def judge(run: Run) -> Judgement:
    """A run by its results: in doubt where anything is; believed where a trust report on all test images has found
    every check ok, AutoAttack among them; else not settled."""
    result, place = headline(run), shlex.quote(str(run.folder))
    if result is None:
        return Judgement("none", [("open", f"no evaluation yet: mwpb-fast evaluate {place}")])
    trust = _trust(run, result)
    reasons: list[tuple[str, str]] = []
    if result.stale:
        reasons.append(
            ("doubt", f"{result.file} is of another checkpoint than the run has now; evaluate it again")
        )
    reasons += [("doubt", f"warning ({kind}): {message}") for kind, message in result.warnings.items()]
    if trust is not None:
        reasons += [("doubt", f"{check}: {text}") for check, verdict, text in trust.verdicts if verdict == "doubt"]
        reasons += [("ok", f"{check}: {text}") for check, verdict, text in trust.verdicts if verdict == "note"]
        if skipped := [check for check, verdict, _ in trust.verdicts if verdict not in ("ok", "doubt", "note")]:
            reasons.append(("open", f"not run in the trust report: {', '.join(skipped)}: mwpb-fast trust {place}"))
    else:
        reasons.append(("open", f"no trust report of this checkpoint: mwpb-fast trust {place}"))
    if result.preview:
        reasons.append(
            (
                "open",
                f"a preview: {counted(result.n, 'image')}, not the whole test set: mwpb-fast evaluate {place}",
            )
        )
    elif trust is not None and trust.preview:
        reasons.append(
            ("open", f"the trust report is a preview: {trust.n:,} of {result.n:,} images: mwpb-fast trust {place}")
        )
    if not _autoattack(result):
        strongest = list(attacked(result))
        attacks, cure = ", ".join(strongest) or "no attack", ",".join(["natural", *strongest, "aa"])
        reasons.append(("open", f"no AutoAttack: the robust accuracy is an upper bound, from {attacks}: "
                                f"mwpb-fast evaluate {place} --attacks {cure}"))  # fmt: skip
    if run.last_epoch < run.count("epochs"):
        reasons.append(("open", f"the run is not finished: {run.last_epoch} of {run.count('epochs')} epochs"))
    if bad := sum(int(value) for _, value in run.column("bad_steps")):
        reasons.append(("open", f"training steps that were not finite, and left the weights alone: {bad}"))
    if trust is not None and (fine := sum(verdict == "ok" for _, verdict, _ in trust.verdicts)):
        reasons.append(("ok", f"{fine} of {counted(len(trust.verdicts), 'check')} of the trust report ok"))
    if result.stale is None:
        reasons.append(("open", "there is no checkpoint by which to tell whether the result is of this run's"))
    if result.stale is False:
        reasons.append(("ok", "the result is of the checkpoint that the run has now, by its SHA-256"))
    reasons.sort(key=lambda reason: ("doubt", "open", "ok").index(reason[0]))
    return Judgement(reasons[0][0], reasons, result, robust_of(result), result.attacks.get("natural"))


def _trust(run: Run, result: Result) -> Result | None:
    """The trust report of the checkpoint that a result is of; one on all images first."""
    found = [r for r in run.results if r.verdicts and r.which == result.which and not r.stale]
    return min(found, key=lambda r: r.preview, default=None)


def trust_report(run: Run) -> Result | None:
    """The trust report that stands beside the run's headline."""
    result = headline(run)
    return _trust(run, result) if result else None


def _autoattack(result: Result) -> bool:
    return any(name.partition("@")[0] == "aa" for name in attacked(result))


def robust_of(result: Result) -> Attack | None:
    """The point-wise worst case, where an attack is in it: previews and those at other radii are not."""
    return result.worst if attacked(result) else None
