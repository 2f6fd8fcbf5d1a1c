"""A data set: stripes, horizontal or vertical, in noise. `--data.name own.stripes`."""

from mwpb_fast.data.dataset import Images
from mwpb_fast.system.lazy import torch

COUNTS = {"train": 1024, "test": 256}


def images(name: str, split: str) -> Images:
    """The train or test split: uint8 (N, 1, 8, 8); a function of its name alone."""
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.arange(COUNTS[split]) % 2
    wave = 96 * (torch.arange(8) % 2)
    pixels = torch.where(labels[:, None, None] == 0, wave[:, None], wave[None, :])
    noise = torch.randint(160, (COUNTS[split], 8, 8), generator=generator)
    return Images((pixels + noise).to(torch.uint8)[:, None], labels, ("horizontal", "vertical"), origin=name)
