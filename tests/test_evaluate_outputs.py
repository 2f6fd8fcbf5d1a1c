"""What a model may give: not finite, dependent on its batch, no logits: a right value, a doubt, or one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import (
    PRECISION,
    Wrap,
    config,
    flags_of,
    labelled,
    linear,
    one_line,
    one_thread,  # noqa: F401  # an autouse fixture
    run,
    short,  # noqa: F401  # a fixture
    untrained_state,
)
from torch import Tensor, nn

from mwpb_fast import cli
from mwpb_fast.config import EvaluationConfig
from mwpb_fast.evaluation.evaluate import evaluate
from mwpb_fast.evaluation.model_checks import EvaluationError
from mwpb_fast.evaluation.score import format_table
from mwpb_fast.evaluation.trust import judge
from mwpb_fast.runs import checkpoint

# not finite -----------------------------------------------------------------------------------------------------


def test_gradients_that_are_not_finite_are_a_doubt() -> None:
    model = linear()
    odd = Wrap(model, lambda m, x: m(x) + 0 * (x - x).square().sum((1, 2, 3)).sqrt()[:, None])
    result = run(odd, labelled(model), config("natural", "pgd3"))
    assert result["attacks"]["pgd3"]["not_finite"] == {"logits": 0, "gradients": 120}
    assert "not_finite" not in result["attacks"]["natural"]
    assert list(result["warnings"]) == ["not_finite_gradients"]
    assert "gradients are not finite, which leads an attack nowhere: 120 times in pgd3" in format_table(result)


def test_trust_doubts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear()
    for scale, doubted in ((float("nan"), True), (1.0, False)):
        odd = Wrap(model, lambda m, x, scale=scale: m(x) * scale)
        result = run(odd, labelled(model), config("natural"))
        result["attacks"] |= {name: result["attacks"]["natural"] | {"values": v} for name, v in PROBED.items()}
        found = {v["check"]: v for v in judge(result, EvaluationConfig())["verdicts"]}["finite numbers"]
        assert (found["verdict"] == "doubt") is doubted
        assert ("40 times in natural" in found["text"]) is doubted


PROBED: dict[str, Any] = {"weighted": {"radius": [0.1]}, "gradients": {"zero_share": [0.0]}}


def test_an_evaluation_that_is_doubtful_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = untrained_state()
    state["model"]["linear.bias"][0] = float("nan")
    path = checkpoint.save(tmp_path, "best", 3, 0, state)
    words = ["evaluate", str(path), "--attacks", "natural", "--subset", "20"]
    assert cli.main(words) == 1
    told = capsys.readouterr()
    assert "the model's logits are not finite, which counts as wrong: 20 times in natural" in told.out
    assert "doubtful" in told.err
    assert cli.main([*words, "--accept-warnings"]) == 0


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("attack", ["natural", "pgd5", "cw5", "fgsm", "aa", "apgd-t", "fab", "square"])
@pytest.mark.parametrize("classes", [10, 4])
def test_a_class_that_is_ruled_out_changes_nothing(attack: str, classes: int) -> None:
    """-inf at a class that no label is of; with few classes it is among the targets."""
    model = linear(classes)
    x = torch.rand(24, 3, 4, 4)
    y = model(x).argmax(1)
    ruled_out = Wrap(model, lambda m, x: torch.cat((m(x), torch.full((len(x), 1), -torch.inf)), 1))
    plain, masked = (run(m, (x, y), config(attack)) for m in (model, ruled_out))
    assert masked["warnings"] == plain["warnings"]
    assert "not_finite" not in masked["attacks"][attack]
    if classes == 10 or attack not in ("aa", "apgd-t", "fab"):  # where one more target draws other numbers
        assert flags_of(masked) == flags_of(plain)
    assert abs(masked["attacks"][attack]["correct"] - plain["attacks"][attack]["correct"]) <= 2


# batches --------------------------------------------------------------------------------------------------------


def norm() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(48, 10)).eval()


MIXING: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "images less their mean": lambda m, x: m(x - x.mean(0)),
    "over the largest": lambda m, x: m(x) / m(x).abs().max() * torch.linspace(1, 2, len(x))[:, None],
    "a neighbour's logits": lambda m, x: m(x) + 0.1 * m(x).roll(1, 0),
    "softmax over the wrong dimension": lambda m, x: m(x).softmax(0),
    "the batch's standard deviation": lambda m, x: m(x) / (m(x).std(0, correction=0) + 0.1),
}


@pytest.mark.parametrize("how", [*MIXING, "batch norm without statistics"])
def test_a_prediction_that_depends_on_its_batch_is_a_doubt(how: str) -> None:
    model = linear()
    mixing = norm() if how not in MIXING else Wrap(model, MIXING[how])
    result = run(mixing, labelled(model), config("natural"))
    assert "depend on the rest of its batch" in result["warnings"]["batch"]["message"]
    assert "warning (batch)" in format_table(result)


def test_randomness_is_told_from_dependence_on_the_batch() -> None:
    model = linear()
    result = run(Wrap(model, lambda m, x: m(x + 0.1 * torch.randn_like(x))), labelled(model), config("natural"))
    assert list(result["warnings"]) == ["randomized"]
    for quiet in (
        model,
        Wrap(model, lambda m, x: m(x).bfloat16()),
        Wrap(model, lambda m, x: m(x).bfloat16().float()),
    ):
        assert run(quiet, labelled(model), config("natural"))["warnings"] == {}


def test_a_model_that_fails_on_one_image_says_so() -> None:
    fails = nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.BatchNorm1d(10, track_running_stats=False)).eval()
    assert "Expected more than 1 value" in one_line(
        lambda: run(fails, (torch.rand(4, 3, 4, 4), torch.arange(4)), config("natural"))
    )


# outputs --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "tuple": (lambda z: (z, z), "returns a tuple"),
    "dictionary": (lambda z: {"logits": z}, "returns a dict"),
    "nothing": (lambda z: None, "returns a NoneType"),
    "array": (lambda z: z.detach().numpy(), "returns a ndarray"),
    "one dimension": (lambda z: z[:, 0], r"torch.float32 \(1,\)"),
    "squeezed": (lambda z: z.squeeze(), r"torch.float32 \(10,\)"),
    "three dimensions": (lambda z: z[:, :, None], r"\(1, 10, 1\)"),
    "transposed": (lambda z: z.T, r"\(10, 1\)"),
    "labels": (lambda z: z.argmax(1), "int64"),
    "whole numbers": (lambda z: z.long(), "int64"),
    "complex": (lambda z: torch.complex(z, z), "complex64"),
    "an error": (lambda z: z.no_such_thing, "no_such_thing"),
    "a failed assertion": (lambda z: exec("assert not 'two\\nlines'"), "AssertionError"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_logits_is_refused_in_one_line(what: str) -> None:
    change, reason = REFUSED[what]
    model = linear()
    with pytest.raises(EvaluationError, match=f"the model cannot be evaluated: .*{reason}") as caught:
        run(Wrap(model, lambda m, x: change(m(x))), labelled(model), config("natural"))
    assert "\n" not in str(caught.value)


def test_an_output_that_changes_on_the_way_is_refused() -> None:
    model, calls = linear(), []

    def later(model: nn.Module, x: Tensor) -> Any:
        calls.append(len(x))
        return (model(x),) if len(x) == 40 else model(x)

    assert "returns a tuple" in one_line(lambda: run(Wrap(model, later), labelled(model), config("natural")))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_floating_type_are_cast(dtype: torch.dtype) -> None:
    model = linear()
    x, y = labelled(model)
    result = run(Wrap(model, lambda m, x: m(x).to(dtype)), (x, y), config("natural", "pgd2", "cw2", "aa"))
    assert result["attacks"]["natural"]["flags"] == "".join(
        "01"[int(flag)] for flag in model(x).to(dtype).float().argmax(1) == y
    )


def test_inference_mode() -> None:
    """A model's own leaves no gradient; a caller's makes no difference."""
    model = linear()
    x, y = labelled(model)
    shut = Wrap(model, torch.inference_mode()(lambda m, x: m(x)))
    told = one_line(lambda: run(shut, (x, y), config("natural", "pgd2")))
    assert "pgd2 follows the model's gradient, and there is none" in told
    assert flags_of(run(shut, (x, y), config("natural"))) == flags_of(run(model, (x, y), config("natural")))
    with torch.inference_mode():
        inside = evaluate(model, (x.clone(), y.clone()), config("natural", "pgd2"), PRECISION, show=False)
    assert flags_of(inside) == flags_of(run(model, (x, y), config("natural", "pgd2")))


def test_a_callable_is_evaluated() -> None:
    model = linear()
    images, settings = labelled(model), config("natural", "pgd2")
    assert flags_of(run(lambda x: model(x), images, settings)) == flags_of(run(model, images, settings))  # type: ignore[arg-type]


def test_out_of_memory_is_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, "best", 3, 0, untrained_state())
    for message in ("DefaultCPUAllocator: can't allocate memory: you tried", "not enough memory: you tried to"):

        def fail(*args: object, message: str = message) -> None:
            raise RuntimeError(message)

        monkeypatch.setattr(nn.Linear, "forward", fail)
        assert cli.main(["evaluate", str(path), "--attacks", "natural", "--subset", "8"]) == 1


@pytest.mark.parametrize("how", ["rounded images", "a saturated softmax", "a threshold"])
def test_a_gradient_that_is_zero_everywhere_is_a_doubt(how: str) -> None:
    model = linear()
    functions: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
        "rounded images": lambda m, x: m((x * 255).round() / 255),
        "a saturated softmax": lambda m, x: (1e5 * m(x)).softmax(1),
        "a threshold": lambda m, x: m((x > 0.5).float() + 0 * x),
    }
    flat = Wrap(model, functions[how])
    result = run(flat, labelled(model), config("natural", "pgd2"))
    assert "gradient is zero at all of 8 images" in result["warnings"]["zero_gradients"]["message"]
    assert run(flat, labelled(model), config("natural", "spsa1", costly_subset=1))["warnings"] == {}


def test_one_class_is_no_model() -> None:
    model = linear()
    single = Wrap(model, lambda m, x: m(x)[:, :1])
    images = torch.rand(4, 3, 4, 4), torch.zeros(4).long()
    assert "for one class" in one_line(lambda: run(single, images, config("natural")))
