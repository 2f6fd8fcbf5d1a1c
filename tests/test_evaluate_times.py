"""The times that an evaluation says, held to a clock that goes on by a second with each forward pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluate_cases import PRECISION, config, labelled, linear, run
from evaluate_cases import one_thread as one_thread  # an autouse fixture
from evaluate_cases import short as short  # a fixture

from mwpb_fast.evaluation import evaluate, prefilter, sharded
from mwpb_fast.evaluation.autoattack import COMPONENTS, cost
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.evaluation.course import Counter, Course
from mwpb_fast.evaluation.score import time_taken
from mwpb_fast.evaluation.session import Session
from mwpb_fast.system.processes import Helpers


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def tick(self) -> None:
        self.now += 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    told = SimpleNamespace(time=lambda: clock.now, monotonic=lambda: clock.now, sleep=lambda seconds: None)
    monkeypatch.setattr(sharded, "time", told)
    monkeypatch.setattr(prefilter, "time", told)
    monkeypatch.setattr(sharded, "SHARD", 10)
    return clock


def seconds(result: dict[str, Any]) -> dict[str, float]:
    return {name: attack["seconds"] for name, attack in result["attacks"].items()}


def test_time_for_which_anybody_was_at_it() -> None:
    assert time_taken([]) == 0
    assert time_taken([(5.0, 3.0)]) == 3
    assert time_taken([(5.0, 3.0), (8.0, 2.0)]) == 5  # one after the other
    assert time_taken([(8.0, 2.0), (5.0, 3.0), (100.0, 1.0)]) == 6  # with a break
    assert time_taken([(5.0, 3.0), (5.0, 4.0), (6.0, 1.0)]) == 4  # at once
    assert time_taken([(5.0, 3.0), (7.0, 4.0)]) == 6  # in part
    assert time_taken([(None, 3.0), (7.0, 4.0), (None, 2.0)]) == 9  # of an earlier version


@pytest.mark.parametrize(("images", "shards"), [(10, 1), (40, 4)])
def test_each_attack_has_the_time_of_its_own_shards(clock: Clock, images: int, shards: int) -> None:
    model = linear()
    result = run(model, labelled(model, images), config("natural", "pgd3", "pgd7"), tick=clock.tick)
    assert seconds(result) == {"natural": 1.0 * shards, "pgd3": 4.0 * shards, "pgd7": 8.0 * shards}


def test_an_evaluation_that_is_gone_on_with_has_the_time_of_the_work(clock: Clock, tmp_path: Path) -> None:
    model, settings = linear(), config("pgd3")
    images = labelled(model)
    begun = Session(model, images, settings, PRECISION, tmp_path)
    with begun.ready(clock.tick):
        begun.attack("pgd3").run(begun.model, [0, 1])
    clock.now += 5000
    assert seconds(run(model, images, settings, folder=tmp_path, tick=clock.tick)) == {"pgd3": 16.0}
    clock.now += 5000  # nothing is left to do, and nothing is added
    assert seconds(run(model, images, settings, folder=tmp_path, tick=clock.tick)) == {"pgd3": 16.0}


def test_several_processes_at_once_count_once(clock: Clock, tmp_path: Path) -> None:
    """Each of two has two shards of 4 s; the second began 3 s later."""
    model, settings = linear(), config("pgd3")
    images = labelled(model)
    for part, began in enumerate((2000.0, 2003.0)):
        session = Session(model, images, settings, PRECISION, tmp_path)
        with session.ready(clock.tick):
            clock.now = began - 1  # a tick before the first shard
            session.attack("pgd3").run(session.model, range(part, 4, 2))
    assert seconds(run(model, images, settings, folder=tmp_path, tick=clock.tick)) == {"pgd3": 11.0}
    # shards that do not say when they were made: all that was worked
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_bytes())
        del record["began"], record["sha256"]
        path.write_text(json.dumps(sharded.sealed(record)), encoding="utf-8")
    assert seconds(run(model, images, settings, folder=tmp_path, tick=clock.tick)) == {"pgd3": 16.0}


@pytest.mark.usefixtures("short")
def test_the_stages_of_a_preview_make_up_its_time(clock: Clock) -> None:
    model = linear()
    entry = run(model, labelled(model), config("aa-fast"), tick=clock.tick)["attacks"]["aa-fast"]
    assert set(entry["stages"]) == {"prefilter", "standard"}
    assert sum(entry["stages"].values()) == entry["seconds"]


# progress -----------------------------------------------------------------------------------------------------


def test_the_share_of_an_attack_that_is_done() -> None:
    """Two parts for 10 images: 30 passes with gradients, then 40 without for the 5 that are left."""
    course = Course(10 * 70.0, since=100)
    assert course.share(100) == 0
    course.begin(100, "first", 2, 10 * (60 + 40))
    assert course.share(250) == pytest.approx(300 / 1000)
    assert course.share(400) == pytest.approx(600 / 1000)
    course.begin(400, "second", 1, 5 * 40)
    assert course.share(400) == pytest.approx(600 / 800)
    assert course.share(500) == pytest.approx(700 / 800)
    assert course.share(600) == course.share(700) == 1
    told: list[tuple[int, str]] = []
    counter = Counter(10, lambda images, part: told.append((images, part)))
    for share, part in ((0.0, "a"), (0.31, "a"), (0.25, "a"), (0.25, "b"), (0.31, "b"), (1.0, "b")):
        counter.reach(share, part)
    assert told == [(0, "a"), (3, "a"), (0, "b"), (7, "b")]


@pytest.mark.usefixtures("short")
def test_the_part_at_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear()
    told: list[tuple[int, str]] = []
    for name, own in (("aa", []), ("aa-fast", ["prefilter"])):
        told.clear()
        session = Session(model, labelled(model), config(name), PRECISION)
        with session.ready(lambda: None):
            session.attack(name).run(session.model, [0], lambda images, part: told.append((images, part)))
        assert list(dict.fromkeys(part for _, part in told if part)) == [
            *own,
            "apgd-ce",
            "apgd-t",
            "fab-t",
            "square",
        ]
        assert sum(images for images, _ in told) == 40
        assert all(images >= 0 for images, _ in told)


def test_parts_cost_what_their_passes_do() -> None:
    assert cost(["square"]) == COMPONENTS["square"].forwards
    assert cost(["apgd-ce", "square"]) == 2 * COMPONENTS["apgd-ce"].forwards + COMPONENTS["square"].forwards


def test_progress_counts_what_is_left_and_takes_helpers_to_be_as_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four shards one was there; of the other three this process has one, and a helper that dies two."""
    monkeypatch.setattr(sharded, "SHARD", 10)
    monkeypatch.setitem(find_attack.__globals__["NAMED"], "long", replace(find_attack("pgd3"), long=True))
    model, bars = linear(), []

    class Bar:
        def __init__(self, total: int, label: str, done: int, sure: float, form: str) -> None:
            self.done, self.told = done, [done]
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *exc: object) -> None: ...

        def advance(self, n: int, note: str) -> None:
            self.done += n
            self.told.append(self.done)

    monkeypatch.setattr(evaluate, "progress", Bar)
    session = Session(model, labelled(model), config("long"), PRECISION, tmp_path)
    with session.ready(lambda: None):
        session.attack("long").run(session.model, [0])
    helpers = Helpers()
    helpers.count = 1

    class Started:
        def __enter__(self) -> Helpers:
            return helpers

        def __exit__(self, *exc: object) -> None: ...

    evaluate.attack_all(session, start_helpers=lambda unfinished: Started())  # type: ignore[arg-type, return-value]
    first, rest = bars
    assert (first.told[0], first.told[-1]) == (10, 40)
    assert first.told == sorted(first.told)
    assert (rest.told[0], rest.told[-1]) == (20, 40)
    assert torch.tensor(rest.told).diff().max() <= 10
