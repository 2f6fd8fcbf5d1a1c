"""What a step puts back where it turns out not to be finite, without a wait for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Rollback:
    """Copies of tensors, all of one type side by side: a few operations however many tensors there are.

    Everything is allocated at construction, so a CUDA graph can hold `save` and `put_back`.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for t in tensors:
            groups.setdefault((t.dtype, t.device), []).append(t)
        self._groups = [_Group(group) for group in groups.values()]

    def save(self) -> None:
        """Keep the values as they are now."""
        for group in self._groups:
            group.pack(group.kept)

    def put_back(self, finite: torch.Tensor) -> None:
        """finite: scalar boolean; where it is False, the tensors get the values that were kept."""
        for group in self._groups:
            group.pack(group.now)
            torch.where(finite, group.now, group.kept, out=group.now)
            torch._foreach_copy_(group.tensors, group.views)


class _Group:
    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.kept = torch.cat([t.reshape(-1) for t in tensors])
        self.now = torch.empty_like(self.kept)
        parts = self.now.split([t.numel() for t in tensors])
        self.views = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def pack(self, into: torch.Tensor) -> None:
        torch.cat([t.reshape(-1) for t in self.tensors], out=into)
