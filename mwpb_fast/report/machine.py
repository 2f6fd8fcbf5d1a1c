"""The parts of a page that are about the machine: speed, engine, versions, configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mwpb_fast.config import yaml_file
from mwpb_fast.report import curves
from mwpb_fast.report.markup import Markup, details, element, table
from mwpb_fast.report.parts import soft
from mwpb_fast.report.read import Run, number_in
from mwpb_fast.system.units import duration, pace


def machine(run: Run, alone: bool) -> list[Markup]:
    found: list[Markup] = []
    speeds, seconds = run.column("images_per_second"), sum(value for _, value in run.column("seconds"))
    if speeds:
        middle = sorted(value for _, value in speeds)[len(speeds) // 2]
        waits = [value for _, value in run.column("wait_share")]
        waited = f", {100 * sum(waits) / len(waits):.1f} % of it waiting for data" if waits else ""
        found.append(
            element("p", f"{pace(middle, 'images') or '0 images/s'} (median of the epochs), "
                         f"{duration(seconds)} in training steps{waited}.")
        )  # fmt: skip
        if alone:
            found.append(element("div", curves.speed([run]), class_="charts"))
    found += _engine(run)
    plain = {key: value for key, value in run.environment.items() if not isinstance(value, Mapping)}
    rows = [[key, str(value)] for key, value in plain.items()]
    ops = run.environment.get("ops")
    kinds = [str(kind) for kind in ops.values()] if isinstance(ops, Mapping) else []
    rows.append(["ops", ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))])
    return [*found, details("Environment", table(["what", "value"], rows, "environment.json", wide=True))]


def _engine(run: Run) -> list[Markup]:
    """What the attack ran on, and what else was tried."""
    engine = run.engine
    chosen = engine.get("chosen")
    if not isinstance(chosen, Mapping):
        return [soft("Which engine the run took is not on record.")]
    found = [element("p", f"Engine: {chosen.get('name', '?')}, {engine.get('why', '')}")]
    rows = []
    for tried in _mappings(engine.get("tried")):
        time, ledger = number_in(tried.get("milliseconds")), tried.get("ledger")
        proofs = {key: number_in(value) for key, value in ledger.items()} if isinstance(ledger, Mapping) else {}
        told = ", ".join(f"{key} {value:.4g}" for key, value in proofs.items() if value is not None)
        rows.append(
            [tried.get("name", "?"), "" if time is None else f"{time:.2f}", told, tried.get("refused") or ""]
        )
    if rows:
        header = ["candidate", "ms", "ledger", "why not"]
        found.append(
            table(header, rows, f"What was tried; times of {engine.get('timed') or 'nothing'}", wide=True)
        )
    for failed in _mappings(engine.get("fallbacks")):
        told = ", ".join(f"{key} {value}" for key, value in failed.items())
        found.append(element("p", f"Failed since: {told}"))
    return found


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []


def configuration(run: Run) -> list[Markup]:
    text = yaml_file.write(run.config).decode("utf-8", "backslashreplace")
    again = element("p", "The same again: ", element("code", f"mwpb-fast train --config {run.folder}/config.yaml"))
    whole = element("pre", text, tabindex=0, role="region", aria_label="config.yaml")
    return [again, details("config.yaml", whole)]
