"""Keys for the starts of attacks that start more than once."""

from __future__ import annotations

from mwpb_fast.system.lazy import ops, torch


def other_key(key: torch.Tensor, number: int) -> torch.Tensor:
    """The `number`th further key that belongs to `key`, a one-element int64 tensor on the same device.

    Its noise has nothing to do with that of `key`. The device is not waited for.
    """
    return torch.bitwise_xor(key, ops.derive_seed(number, 0x57A2))
