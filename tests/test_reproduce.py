"""The paper's numbers, the runs that a table needs, and what the command refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from reproduce_cases import fake_evaluation, natural, runs_of

from mwpb_fast import cli
from mwpb_fast.config import ConfigError, recipe, to_dict
from mwpb_fast.reproduce import render
from mwpb_fast.reproduce.gather import gather
from mwpb_fast.reproduce.plan import identity, plan_runs, result_key, schedule
from mwpb_fast.reproduce.tables import find_table

PAPER = [f"table{n}" for n in range(1, 9)]


# the plan -----------------------------------------------------------------------------------------------------
def test_two_seeds_differ_in_the_seed_only(tmp_path: Path) -> None:
    runs = runs_of("table1", tmp_path)
    assert len(runs) == 27
    by_row: dict[str, list[Any]] = {}
    for run in runs:
        by_row.setdefault(run.row.name, []).append(run)
    for mine in by_row.values():
        assert [run.config.seed for run in mine] == [0, 1, 2]
        assert len({run.folder.parent for run in mine}) == 1
        assert [run.folder.name for run in mine] == ["seed0", "seed1", "seed2"]
        first = to_dict(mine[0].config)
        for run in mine[1:]:
            other = to_dict(run.config)
            assert {key for key in first if first[key] != other[key]} == {"seed"}
    assert len({run.folder for run in runs}) == 27


def test_tables_share_the_runs_of_equal_recipes(tmp_path: Path) -> None:
    folders = {
        f"{name}.{run.row.name}": run.folder
        for name in ("table1", "table2", "table5", "table6", "table7", "table8")
        for run in runs_of(name, tmp_path, seeds=1)
    }
    same = [
        {"table2.mwpb_at", "table5.mwpb_at", "table6.mwpb_at", "table7.mwpb_at", "table8.alpha_058"},
        {"table2.control_at", "table5.control_at", "table6.control_at", "table7.control_at", "table8.alpha_000"},
        {"table2.mwpb_trades", "table6.mwpb_trades", "table7.mwpb_trades"},
        {"table2.mart", "table7.mart"},
        {"table5.mma", "table6.mma"},
    ]
    for names in same:
        folder = folders[min(names)]
        assert {name for name, other in folders.items() if other == folder} == names


def test_identity_is_what_training_depends_on() -> None:
    config = recipe("table1.mwpb_at")

    def changed(**groups: Any) -> str:
        return identity(
            dataclasses.replace(
                config,
                **{
                    name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
                    for name, value in groups.items()
                },
            )
        )

    mine = identity(config)
    for free in (
        {"recipe": "other"},
        {"seed": 3},
        {"data": {"dir": "/elsewhere", "loader": "resident", "threads": 3}},
        {"precision": {"device": "cuda:1"}},
        {"evaluation": {"attacks": ("natural",), "subset": 10, "batch_size": 5}},
    ):
        assert changed(**free) == mine, free
    different = [
        changed(epochs=111),
        changed(warmup_epochs=79),
        changed(attack_mode="train"),
        changed(budget={"alpha": 0.59}),
        changed(warmup={"eps": config.budget.eps}),
        changed(data={"subset": 100}),
        changed(data={"name": "cifar100"}),
        changed(model={"name": "resnet-34"}),
        changed(optim={"drops": (80, 91)}),
        changed(precision={"dtype": "bf16"}),
        changed(attack={"steps": 11}),
        changed(evaluation={"validate_every": 2}),
        identity(recipe("table1.control_at")),
        identity(recipe("table1.mwpb_mart")),
    ]
    assert len({mine, *different}) == len(different) + 1


def test_an_option_that_is_new_and_at_its_default_changes_no_identity() -> None:
    """So that runs on disk are still found when a later version knows more options."""
    config = recipe("table1.mwpb_at")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(type(config.budget)):  # type: ignore[misc]
        later: int = 3

    Later.__module__ = type(config.budget).__module__
    values = dataclasses.asdict(config.budget)
    assert identity(dataclasses.replace(config, budget=Later(**values))) == identity(config)
    assert identity(dataclasses.replace(config, budget=Later(**values, later=4))) != identity(config)


@pytest.mark.parametrize(
    ("name", "epochs", "warmup", "drops"),
    [
        ("table1.mwpb_at", 55, 40, [40, 45]),  # 80 / 2, 90 / 2
        ("table1.mwpb_at", 11, 8, [8, 9]),
        ("table1.mwpb_at", 4, 3, [3, 4]),  # 2.91, 3.27: kept apart
        ("table1.mwpb_at", 2, 1, [2, 3]),  # 1.45; the first epoch has the full learning rate
        ("table1.mwpb_at", 1, 0, [2, 3]),  # no room for two phases
        ("table1.mwpb_at", 220, 160, [160, 180]),
        ("table1.at", 11, None, [8, 9]),
        ("small.mwpb_at", 22, 16, [16, 18]),
    ],
)
def test_schedules_are_scaled(name: str, epochs: int, warmup: int | None, drops: list[int]) -> None:
    expected: dict[str, Any] = {"epochs": epochs, "optim.drops": drops}
    if warmup is not None:
        expected["warmup_epochs"] = warmup
    assert schedule(recipe(name), epochs) == expected


def test_an_axis_numbers_of_epochs_are_scaled() -> None:
    assert schedule(recipe("table5.mail"), 11)["objective.burn_in_epochs"] == 8
    assert schedule(recipe("table5.iaat"), 22)["attack.warmup_epochs"] == 2
    assert schedule(recipe("table5.iaat"), 2)["attack.warmup_epochs"] == 1


@pytest.mark.parametrize(
    ("table", "epochs", "words", "expected"),
    [
        ("table1", 11, ["--objective=mail"], {"burn_in_epochs": 8}),
        ("table1", 11, ["--objective=mail", "--objective.burn_in_epochs=3"], {"burn_in_epochs": 3}),
        ("table1", 0, ["--objective=mail"], {"burn_in_epochs": 80}),
        (
            "table1",
            55,
            ["--objective=gairat", "--attack.count_correct=true"],
            {"burn_in_epochs": 27, "schedule_epochs": 55},
        ),
        # a module's own numbers are for the paper's 110 epochs, not for the 11 of this table
        ("small", 22, ["--objective=mail"], {"burn_in_epochs": 16}),
        ("small", 0, ["--objective=mail"], {"burn_in_epochs": 8}),
    ],
)
def test_the_numbers_of_epochs_of_a_module_put_in_are_scaled(
    table: str, epochs: int, words: list[str], expected: dict[str, int], tmp_path: Path
) -> None:
    (run,) = plan_runs(find_table(table), ["mwpb_at"], 1, tmp_path, words, epochs=epochs)
    assert {name: getattr(run.config.objective, name) for name in expected} == expected
    start = recipe(f"{table}.mwpb_at")
    assert run.config.epochs == (epochs or start.epochs)
    assert run.config.warmup_epochs == start.warmup_epochs * run.config.epochs / start.epochs


def test_options_reach_every_row_and_come_after_the_scaled_schedule(tmp_path: Path) -> None:
    words = ["--warmup_epochs=1", "--data.subset=2000", "--model.name=smallresnet-16"]
    runs = plan_runs(find_table("table1"), ["mwpb-at", "at"], 2, tmp_path, words, epochs=4)
    assert [(run.row.name, run.config.seed) for run in runs] == [
        ("mwpb_at", 0),
        ("at", 0),
        ("mwpb_at", 1),
        ("at", 1),
    ]
    config = runs[0].config
    assert (config.epochs, config.warmup_epochs, config.optim.drops) == (4, 1, (3, 4))
    assert (config.data.subset, config.model.name) == (2000, "smallresnet-16")
    text = "; ".join(gather(find_table("table1"), runs)["changes"])
    for part in (
        "epochs 4 instead of 110",
        "data.subset 2000 instead of all",
        "model.name smallresnet-16 instead of resnet-18",
        "optim.drops [3,4] instead of [80,90]",
        "warmup_epochs 1 instead of 80 (mwpb_at)",
    ):
        assert part in text


def test_nothing_changed_is_said_so_by_nothing(tmp_path: Path) -> None:
    out = gather(find_table("table1"), runs_of("table1", tmp_path, overrides=("--data.dir=x", "--seed=5")))
    assert out["changes"] == []
    assert out["seeds"] == [5, 6, 7]
    assert "Reduced" not in render.markdown(out)


def test_long_attacks_may_have_fewer_images_and_leave_out_the_last_checkpoint(tmp_path: Path) -> None:
    (run,) = runs_of("small", tmp_path, "mwpb_at", seeds=1)
    assert [(which, e.attacks, e.subset) for which, e in run.evaluations] == [
        ("best", ("natural", "pgd20", "cw20"), 1000),
        ("best", ("aa",), 500),
        ("last", ("natural", "pgd20", "cw20"), 1000),
    ]
    # `train` alone is to end in minutes on a CPU
    assert (recipe("small.mwpb_at").evaluation.subset, run.start.evaluation.subset) == (200, 1000)
    assert gather(find_table("small"), [run])["changes"] == []
    (fewer,) = runs_of("small", tmp_path, "mwpb_at", seeds=1, overrides=("--evaluation.subset=100",))
    assert {e.subset for _, e in fewer.evaluations} == {100}
    assert gather(find_table("small"), [fewer])["changes"] == ["evaluation.subset 100 instead of 1000"]
    (run,) = runs_of("table1", tmp_path, "at", seeds=1)
    every = ("natural", "pgd20", "cw20", "aa")
    assert [(which, e.attacks, e.subset) for which, e in run.evaluations] == [
        ("best", every, 0),
        ("last", every, 0),
    ]


def test_a_costly_attack_has_fewer_images_and_the_table_says_so(tmp_path: Path) -> None:
    (run,) = runs_of("table7", tmp_path, "at", seeds=1)
    out = gather(find_table("table7"), [run])
    assert (out["images"]["spsa"], out["images"]["square"]) == (1000, 0)
    assert "Test images, stratified by class: all (natural" in (text := render.markdown(out))
    assert "; 1000 (spsa)." in text
    (fewer,) = runs_of("table7", tmp_path, "at", seeds=1, overrides=("--evaluation.subset=100",))
    assert gather(find_table("table7"), [fewer])["images"]["spsa"] == 100
    (more,) = runs_of("table7", tmp_path, "at", seeds=1, overrides=("--evaluation.costly_subset=2000",))
    assert gather(find_table("table7"), [more])["changes"] == ["evaluation.costly_subset 2000 instead of 1000"]
    assert more.folder == run.folder
    keys = {result_key("spsa", each.evaluations[0][1]) for each in (run, fewer, more)}
    assert len(keys) == 3


def test_states_of_a_run(tmp_path: Path) -> None:
    (run,) = runs_of("table1", tmp_path, "mwpb_at", seeds=1)
    assert run.state() == "to be run"
    natural(run, best=80.0)
    assert run.state() == "trained, to be evaluated: best, last"
    for which in ("best", "last"):
        fake_evaluation(run, which, dict.fromkeys(("natural", "pgd20", "cw20", "aa"), 50.0))
    assert run.state() == "done"
    (run.folder / "radii.json").unlink()
    assert run.state() == "after epoch 110 of 110"
    (run.folder / "metrics.jsonl").unlink()
    assert run.state() == "begun"
    other = dataclasses.replace(run.config, epochs=9)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(to_dict(other)))
    assert "holds a run with other settings" in run.state()
    with pytest.raises(ConfigError, match="other settings"):
        run.trained()


# what is refused ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["table9"], "there are table1, table2"),
        ([], "the following arguments are required: TABLE"),
        (["table1", "--rows", "nope"], "table1 has no row 'nope'; it has at, control_at"),
        (["table1", "--rows", ""], "table1 has no row ''"),
        (["table1", "--seeds", "0"], "--seeds must be at least 1"),
        (["table1", "--epochs", "-3"], "not negative"),
        (["table1", "--epochs", "x"], "invalid int value"),
        (["table1", "--model", "nope-3"], "model.name"),
        (["table1", "--attacks", "nope"], "no attack 'nope'"),
        (["table1", "--test-subset", "-1"], "subset"),
        (["table1", "--nope", "3"], "no option 'nope'"),
        (["table1", "--budget.alpha", "0.6"], "table1.at: no option 'budget.alpha'; did you mean budget.eps?"),
        (["table1", "--last", "none"], "invalid choice"),
    ],
)
def test_refused_in_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["reproduce", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
