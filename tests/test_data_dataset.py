"""The order of epochs, splits, and the validation of images and of the configuration."""

from __future__ import annotations

import subprocess
import sys

import mwpb_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mwpb_fast.data import (
    Config,
    DataError,
    Images,
    epoch_order,
    split_indices,
    split_validation,
    stratified_order,
)
from mwpb_fast.data.dataset import Plan


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox 4x32-10 in Python integers, from the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def test_philox_in_this_file_is_right() -> None:
    known = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)  # the Random123 distribution's known answer
    assert philox((0, 0, 0, 0), (0, 0)) == known


@pytest.mark.parametrize(("n", "seed", "epoch"), [(1, 0, 0), (16, 0, 1), (101, 7, 3), (999, 2**40 + 1, 109)])
def test_epoch_order_is_the_argsort_of_philox_words(n: int, seed: int, epoch: int) -> None:
    key = mwpb_kernels.derive_seed(seed, epoch)
    words = [philox((0, i, 0, 5), (key & 0xFFFFFFFF, key >> 32)) for i in range(n)]
    signed = [((w[0] << 32 | w[1]) ^ 1 << 63) - (1 << 63) for w in words]
    assert epoch_order(n, seed, epoch).tolist() == sorted(range(n), key=lambda i: signed[i])


GOLDEN = [11, 10, 6, 3, 1, 0, 12, 4, 2, 14, 7, 9, 5, 13, 15, 8]


def test_epoch_order_never_changes() -> None:
    assert epoch_order(16, 0, 1).tolist() == GOLDEN
    assert epoch_order(16, 0, 1).dtype == torch.int64


def test_epoch_orders_differ_by_seed_and_epoch() -> None:
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_epoch_order_ignores_the_global_generator_and_thread_count() -> None:
    torch.manual_seed(1)
    first = epoch_order(1000, 3, 4)
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(first, epoch_order(1000, 3, 4))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.floats(0.0, 0.9), st.integers(0, 5))
def test_split_is_stratified(counts: list[int], fraction: float, seed: int) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[epoch_order(len(labels), 9, 9)]
    train, val = split_validation(labels, fraction, seed)
    assert sorted(train.tolist() + val.tolist()) == list(range(len(labels)))
    assert len(val) == round(fraction * len(labels))
    share = torch.bincount(labels[val], minlength=len(counts))
    assert (share - len(val) / len(labels) * torch.tensor(counts)).abs().max() <= 1.5
    again = split_validation(labels, fraction, seed)
    assert torch.equal(train, again[0])
    assert torch.equal(val, again[1])


def test_balanced_split_is_exact() -> None:
    labels = torch.arange(10).repeat(500)
    _, val = split_validation(labels, 0.02)
    assert torch.bincount(labels[val]).tolist() == [10] * 10
    assert not torch.equal(val, split_validation(labels, 0.02, seed=1)[1])


def test_subsets_are_stratified_and_nested() -> None:
    labels = torch.arange(10).repeat(100)
    small, large = (split_indices(labels, Config(subset=n, validation=0.1))[0] for n in (100, 450))
    assert torch.bincount(labels[small]).tolist() == [10] * 10
    assert set(small.tolist()) <= set(large.tolist())
    assert sorted(stratified_order(labels).tolist()) == list(range(1000))
    with pytest.raises(DataError, match="subset is 901"):
        split_indices(labels, Config(subset=901, validation=0.1))


def images(**change: object) -> Images:
    fields = {
        "images": torch.zeros(3, 3, 4, 5, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 1]),
        "classes": ("a", "b"),
        "origin": "some.file",
    }
    return Images(**{**fields, **change})  # type: ignore[arg-type]


def test_images_become_channels_last() -> None:
    good = images()
    assert good.images.is_contiguous(memory_format=torch.channels_last)
    assert (len(good), good.channels, good.num_classes) == (3, 3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 3, 4, 5)}, "need uint8"),
        ({"images": torch.zeros(3, 4, 5, dtype=torch.uint8)}, "need uint8"),
        ({"images": torch.zeros(3, 2, 4, 5, dtype=torch.uint8)}, "channels"),
        ({"images": torch.zeros(0, 3, 4, 5, dtype=torch.uint8), "labels": torch.zeros(0).long()}, "N > 0"),
        ({"labels": torch.tensor([0, 1])}, "labels are"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0])}, "labels are"),
        ({"labels": torch.tensor([0, 1, 2])}, "label 2 is out of range"),
        ({"labels": torch.tensor([0, -1, 1])}, "label -1 is out of range"),
    ],
)
def test_bad_images_are_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        images(**change)
    assert str(caught.value).startswith("some.file: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"loader": "fast"},
        {"pad_mode": "edge"},
        {"last_batch": "pad"},
        {"batch_size": 0},
        {"validation": 1.0},
        {"validation": -0.1},
        {"validation": float("nan")},
        {"pad": -1},
        {"pad": 256},
        {"subset": 0},
        {"threads": -1},
    ],
)
def test_bad_options_are_named(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Config(**change)  # type: ignore[arg-type]


def test_plan_covers_the_epoch_and_resumes() -> None:
    index = torch.arange(5, 105, 2)
    split = images(images=torch.zeros(200, 1, 2, 2, dtype=torch.uint8), labels=torch.zeros(200).long())
    for last_batch, sizes in (("drop", [16] * 3), ("keep", [16] * 3 + [2])):
        config = Config(batch_size=16, last_batch=last_batch)  # type: ignore[arg-type]
        plan = Plan(split, config, 1, index)
        batches = plan.epoch(4, 0)
        assert [len(batch) for batch in batches] == sizes
        assert plan.batches == len(sizes)
        seen = torch.cat(batches)
        assert torch.equal(seen, index[epoch_order(50, 1, 4)][: len(seen)])
        for start in range(len(sizes) + 1):
            assert all(map(torch.equal, plan.epoch(4, start), batches[start:]))
    with pytest.raises(ValueError, match="start is 5"):
        plan.epoch(4, 5)
    with pytest.raises(DataError, match="batch_size is 64"):
        Plan(split, Config(batch_size=64), 1, index)
    with pytest.raises(DataError, match="positions"):
        Plan(split, Config(batch_size=4), 1, index + 150)


def test_the_configuration_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'PIL', 'scipy', 'sklearn', 'nvidia.dali'}"
    code = f"import sys, mwpb_fast.data; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
