"""Both halves of an attack's batch at the same time, on two CUDA streams: while one half is at a pass over memory,
the other can be at a convolution."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.method import Net


class HalvesNet(Net):
    """A Net (see engine/net.py) that runs `net` on each half of a batch, the second one on a stream of its own.

    What an attack does between the logits and their gradient it does once, for the whole batch, and so with all
    that is outside of the net: starts, steps and memory are the very same. In eval mode an image's logits do not
    depend on its neighbours, so both halves give the whole's values, as far as a library that chooses by size
    rounds alike. In train mode they do: then the whole is run as it is, and so is a batch of one image. Of an
    odd batch the first half is the larger. Each half has as many launches as the whole, so this is for CUDA
    graphs.

    Each stream waits for the other wherever it reads what was made there, and again before the caller goes on,
    so memory is never given out anew while the other stream may still use it. Nothing waits on the host.
    """

    def __init__(self, net: TwinNet, device: torch.device) -> None:
        self.net, self.side = net, torch.cuda.Stream(device)

    def refresh(self) -> None:
        """As Net.refresh."""
        self.net.refresh()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """As Net.logits."""
        if self._undivided(x):
            return self.net.logits(x)
        first, second = x.tensor_split(2)
        main = torch.cuda.current_stream(x.device)
        with self._beside(main):
            others = self.net.logits(second)
            with torch.cuda.stream(main):
                mine = self.net.logits(first)
        return torch.cat([mine, others])

    def input_grad(self, x: torch.Tensor, dlogits: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """As Net.input_grad. The first half's pass runs within the second's, between its logits and their
        gradient: there both halves meet, and neither waits for the other's way back."""
        if self._undivided(x):
            return self.net.input_grad(x, dlogits)
        first, second = x.tensor_split(2)
        main, side = torch.cuda.current_stream(x.device), self.side
        kept: list[torch.Tensor] = []

        def between(others: torch.Tensor) -> torch.Tensor:
            def meet(mine: torch.Tensor) -> torch.Tensor:
                main.wait_stream(side)
                kept.extend(dlogits(torch.cat([mine, others])).split([len(mine), len(others)]))
                side.wait_stream(main)
                return kept[0]

            with torch.cuda.stream(main):
                kept.append(self.net.input_grad(first, meet))
            return kept[1]

        with self._beside(main):
            gradient = self.net.input_grad(second, between)
        return torch.cat([kept[2], gradient])

    @contextlib.contextmanager
    def _beside(self, main: Any) -> Iterator[None]:
        """On the other stream, from where `main` is now; `main` goes on when that is done, also where it fails:
        a capture could not be ended otherwise."""
        self.side.wait_stream(main)
        try:
            with torch.cuda.stream(self.side):
                yield
        finally:
            main.wait_stream(self.side)

    def _undivided(self, x: torch.Tensor) -> bool:
        return len(x) < 2 or any(module.training for module in self.net.model.modules())
