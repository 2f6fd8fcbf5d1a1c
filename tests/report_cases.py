"""Run folders as training, evaluation and trust reports leave them, with made-up numbers."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from test_plots import make_run

from mwpb_fast.evaluation.score import score

VOID = {"meta", "link", "img", "br"}
CLASSES = ["cat", "dog"]


def attack(flags: str, **more: Any) -> dict[str, Any]:
    halves = [100 * half.count("1") / len(half) for half in (flags[: len(flags) // 2], flags[len(flags) // 2 :])]
    return {**score(flags), "n": len(flags), "seconds": 0.1, "per_class": halves, **more}


def result(**more: Any) -> dict[str, Any]:
    """What `evaluate` writes, of 100 images: 90 right, 60 under PGD, 50 under AutoAttack."""
    ball = {"norm": "linf", "eps": "8/255"}
    flags = {"natural": "1" * 90 + "0" * 10, "pgd20": "1" * 60 + "0" * 40, "aa": "1" * 50 + "0" * 50}
    attacks = {name: attack(f, **(ball if name != "natural" else {})) for name, f in flags.items()}
    worst = attack(flags["aa"]) | {"of": [*attacks]}
    about = {"format": 2, "sha256": "a" * 64, "n": 100, "norm": "linf", "eps": "8/255", "epoch": 30, "notes": []}
    about |= {"classes": CLASSES, "data_sha256": "d" * 64, "preview": False, "warnings": {}}
    return {**about, "attacks": attacks, "worst": worst, **more}


def verdicts(*kinds: str) -> list[dict[str, str]]:
    return [{"check": f"check {i}", "verdict": kind, "text": f"text {i}"} for i, kind in enumerate(kinds)]


def whole_run(folder: Path, name: str = "digits.mwpb_at", **trust: Any) -> Path:
    """A run with everything but a checkpoint: its checksum stands for it."""
    make_run(folder, name)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best-00030-0000000.pt.sha256").write_text("a" * 64 + "  best-00030-0000000.pt\n")
    sweep = {
        f"pgd20@{k}/255": attack("1" * (80 - 5 * k) + "0" * (20 + 5 * k), norm="linf", eps=f"{k}/255")
        for k in (4, 16)
    }
    write(folder / "evaluation-best.json", result())
    found = result(verdicts=verdicts("ok", "ok"), sweep=[*sweep], **trust)
    write(folder / "trust-best.json", found | {"attacks": found["attacks"] | sweep})
    write(folder / "environment.json", {"torch": "2.13", "device": "a processor", "ops": {"margin": "native"}})
    chosen = {"name": "twin fp32", "net": "twin"}
    tried = [{"name": "eager fp32", "milliseconds": 3.0, "ledger": {"signs": 0.999}, "refused": "slower"}]
    write(folder / "engine.json", {"chosen": chosen, "why": "by a trial", "tried": tried, "timed": "a step"})
    return folder


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


class Page(HTMLParser):
    """A page taken apart. Raises AssertionError where its elements are not nested."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes), tag
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def having(self, attribute: str) -> list[str]:
        return [value or "" for _, found in self.elements for name, value in found.items() if name == attribute]
