"""Several processes at work on one run, as torchrun starts them; each has a rank and an equal part of every batch.

A process alone is rank 0 of 1. There every function here gives back what it is given, and nothing is copied, so
that code which needs the whole batch asks for it in the same way everywhere. What one process calls, all have to,
in the same order.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from mwpb_fast.system.lazy import torch

T = TypeVar("T")

# The longest wait for another process; rank 0 may be at a trial of engines, or at a slow disk, meanwhile.
PATIENCE = datetime.timedelta(minutes=30)
# In what PyTorch's backends say when another process is not there any more.
GONE = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")


class RanksError(RuntimeError):
    """The processes of a run cannot go on together; one line."""


class Place(NamedTuple):
    """rank: of this process, of `size` processes."""

    rank: int = 0
    size: int = 1


_place = Place()
_joins = 0
_apart = False


# who is there ----------------------------------------------------------------------------------------------------
def launched() -> int:
    """How many processes torchrun has started to work on one thing; 1 without it, and in `apart`."""
    return 1 if _apart else _started()


def number() -> int:
    """This process's rank among them."""
    return int(os.environ["RANK"]) if launched() > 1 else 0


def leads() -> bool:
    """Whether this is the process that writes files and speaks for the others."""
    return number() == 0


def first() -> bool:
    """Whether this is torchrun's first process, in `apart` too."""
    return _started() == 1 or os.environ["RANK"] == "0"


def local() -> int | None:
    """Which of torchrun's processes on this machine this one is; None without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _started() > 1 else None


def restarted() -> bool:
    """Whether torchrun has started the processes anew after a failure."""
    return launched() > 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def label() -> str:
    """What a message of this process begins with, so that it is known whose it is: empty for rank 0."""
    return "" if first() else f"rank {os.environ['RANK']}: "


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside the block each process that torchrun has started works for itself, on a device of its own."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def _started() -> int:
    given = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if given else 1


def place() -> Place:
    """Where this process stands among those that are joined now."""
    return _place


def count() -> int:
    """How many processes are joined now."""
    return _place.size


@contextlib.contextmanager
def joined(cuda: bool) -> Iterator[None]:
    """The processes of this launch are together inside the block. cuda: whether they compute on CUDA devices.

    Raises RanksError where they do not come together, or one of them is gone.
    """
    global _place, _joins
    if launched() == 1:
        yield
        return
    dist, _joins = torch.distributed, _joins + 1
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        # the store outlives the processes, and what those of an earlier start left in it would be waited for
        start = f"mwpb-fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_joins}"
        store, backend = dist.PrefixStore(start, store), "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RanksError(f"the {launched()} processes of this run do not come together: {_line(error)}") from error
    _place, sound = Place(rank, size), False
    try:
        yield
        most(0)  # nobody leaves before all are done
        sound = True
    except RuntimeError as error:
        if isinstance(error, RanksError) or not any(word in str(error) for word in GONE):
            raise
        raise RanksError(
            f"another process of this run has ended or is not heard of any more ({_line(error)}); the last "
            "checkpoint is whole, and the same command goes on from it"
        ) from error
    finally:
        _place = Place()
        if sound or not cuda:  # nccl would wait here for one that is gone
            dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process is as one alone: for what it does without the others."""
    global _place
    before, _place = _place, Place()
    try:
        yield
    finally:
        _place = before


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# on the device ---------------------------------------------------------------------------------------------------
def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks, like `values`, of any shape; no gradient flows through it."""
    if count() == 1:
        return values
    return total(values.detach()) / count()


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks, like `values`, of any shape."""
    if count() == 1:
        return values
    values = values.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(values)
    return values


def mean_(tensors: Sequence[torch.Tensor]) -> None:
    """Each tensor becomes its mean over the ranks; those of one type travel together."""
    if count() == 1:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        mine = [t for t in tensors if t.dtype == dtype]
        flat = mean(torch.cat([t.detach().reshape(-1) for t in mine]))
        parts = flat.split([t.numel() for t in mine])
        with torch.no_grad():
            torch._foreach_copy_(mine, [part.view(t.shape) for part, t in zip(parts, mine, strict=True)])


def whole(rows: torch.Tensor) -> torch.Tensor:
    """The whole batch's rows, (n B, ...), from each rank's (B, ...), in the order of the ranks."""
    if count() == 1:
        return rows
    # as bytes, which every backend sends whatever the type
    mine = rows.detach().contiguous().view(-1).view(torch.uint8)
    found = mine.new_empty(count() * len(mine))
    torch.distributed.all_gather(list(found.chunk(count())), mine)
    return found.view(rows.dtype).view(count() * len(rows), *rows.shape[1:])


def own(rows: torch.Tensor) -> torch.Tensor:
    """This rank's rows, (B, ...), of the whole batch's, (n B, ...)."""
    return rows if count() == 1 else rows.chunk(count())[_place.rank]


# on the host -----------------------------------------------------------------------------------------------------
def most(*numbers: int) -> tuple[int, ...]:
    """The largest over the ranks of each number."""
    if count() == 1:
        return numbers
    values = torch.tensor(numbers)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return tuple(int(value) for value in values)


def agreed(reason: str) -> str:
    """What the lowest rank that has something to say says; empty where none has."""
    if count() == 1:
        return reason
    said: list[Any] = [""] * count()
    torch.distributed.all_gather_object(said, reason)
    return next((f"rank {rank}: {text}" if rank else str(text) for rank, text in enumerate(said) if text), "")


def led(work: Callable[[], T]) -> T:
    """The result of `work`, which rank 0 alone does: tensors on the CPU and plain types. Where it fails there, the
    others raise RanksError."""
    if count() == 1:
        return work()
    dist, size, content = torch.distributed, torch.zeros(1, dtype=torch.int64), b""
    if _place.rank:
        dist.broadcast(size, 0)
        if not size:
            raise RanksError("rank 0 cannot go on; its own message says why")
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0)
        result: T = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)[0]
        return result
    try:
        result = work()
        buffer = io.BytesIO()
        torch.save([result], buffer)
        content = buffer.getvalue()
    finally:
        dist.broadcast(size.fill_(len(content)), 0)
    dist.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8), 0)
    return result


def different(tensors: Mapping[str, torch.Tensor]) -> str:
    """Where the ranks' tensors of the same name are not the same to the bit, by their SHA-256, in words; empty
    where all are."""
    if count() == 1:
        return ""
    digests = [_digest(t) for t in tensors.values()]
    every = whole(torch.tensor(digests, dtype=torch.int64)[None])
    for rank, row in enumerate(every):
        wrong = [name for name, same in zip(tensors, (row == every[0]).tolist(), strict=True) if not same]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            return f"rank {rank} has other values than rank 0 in {wrong[0]}{more}"
    return ""


def _digest(t: torch.Tensor) -> int:
    content = t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)
