"""The NVIDIA DALI loader: decoding, padding, cropping and flipping in a DALI pipeline, in our order.

DALI draws nothing at random here: the order of the samples and each one's crop and flip come from the same
counter-based functions as in the resident loader, so both give the same batches, for any number of threads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mwpb_fast.data.dataset import Batch, Config, DataError, Images, Plan
from mwpb_fast.system.layout import in_layout
from mwpb_fast.system.lazy import ops, torch
from mwpb_fast.system.optional import attempt

if TYPE_CHECKING:
    from torch import Tensor

    from mwpb_fast.data.decode import Packed

_PREFETCH = 2


class DaliLoader:
    """Batches of `images` through DALI: on the GPU if `device` is one, else on the CPU.

    encoded: the same samples as image files, which DALI then decodes (on a GPU with its JPEG hardware);
    without it the pixels of `images` are fed. seed, train_index, augment, layout, part: as for the resident
    loader.
    Pixels are equal to the resident loader's bit for bit, except for what two JPEG decoders make of a file.
    """

    def __init__(
        self,
        images: Images,
        config: Config,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        train_index: Tensor | None = None,
        augment: bool = True,
        encoded: Packed | None = None,
        layout: torch.memory_format | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if encoded is not None and len(encoded) != len(images):
            raise DataError(f"{images.origin}: {len(encoded)} image files for {len(images)} images")
        self._plan = Plan(images, config, seed, train_index, augment, part)
        self._device, self._layout = torch.device(device), layout or torch.channels_last
        self._images, self._encoded = images, encoded
        self._labels = images.labels.to(self._device)
        pad = self._plan.pad
        height, width = images.images.shape[2:]
        # zeros come from slicing outside the image, where corners are negative; a reflected border is part of
        # the image that is sliced
        self._corner = 0 if config.pad_mode == "reflect" else -pad
        self._scale = torch.full((), 255.0, device=self._device)
        self._source = _Source()
        self._running = 0  # counts epochs; tells an iterator that another has begun
        self._pipeline: Any = _pipeline(
            self._source,
            batch_size=self._plan.batch_size,
            threads=config.threads or min(8, os.cpu_count() or 1),
            device=self._device,
            shape=(height, width, images.channels),
            reflect=pad if config.pad_mode == "reflect" else 0,
            decode=encoded is not None,
        )

    def __len__(self) -> int:
        return self._plan.batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from batch `start` on. Beginning another epoch ends one that is under way."""
        return self._batches(self._plan.epoch(epoch, start), self._plan.key(epoch))

    def _batches(self, indices: list[Tensor], key: Tensor) -> Iterator[Batch]:
        self._rewind()
        mine = self._running
        self._source.inputs = self._inputs(indices, key)
        for index in indices:
            if self._running != mine or self._pipeline is None:
                raise ValueError("the loader was closed, or another epoch was begun, during this one")
            x = in_layout(self._run(), self._layout)
            yield Batch(x, self._labels[index.to(self._device)], index.to(self._device))

    def _rewind(self) -> None:
        if self._pipeline is None:
            raise ValueError("the loader is closed")
        self._source.inputs = iter(())
        if self._running:
            with contextlib.suppress(StopIteration):
                while True:  # what DALI has read ahead for an epoch that was given up
                    self._pipeline.run()
            self._pipeline.reset()
        self._running += 1

    def _run(self) -> Tensor:
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (pixels,) = self._pipeline.run(stream)
        except RuntimeError as error:
            self.close()  # a pipeline that has failed cannot go on
            reason = next((line for line in str(error).splitlines() if line.strip()), "unknown error")
            raise DataError(f"{self._images.origin}: DALI failed: {reason.strip()}") from error
        # scaled here, where a division is that of the resident loader to the last bit; it also copies out of
        # DALI's buffer, in the order of the stream on which that was handed over
        scaled = torch.from_dlpack(pixels.as_tensor()).to(torch.float32) / self._scale
        return scaled.permute(0, 3, 1, 2)

    def _inputs(self, indices: list[Tensor], key: Tensor) -> Iterator[tuple[Any, Any, Any]]:
        pixels = self._images.images.cpu().permute(0, 2, 3, 1).numpy()
        for index in indices:
            rows = index.numpy()
            samples = pixels[rows] if self._encoded is None else [self._encoded[i] for i in rows]
            params = ops.crop_flip_params(index, key, pad=self._plan.pad, flip=self._plan.flip).numpy()
            yield samples, params[:, :2] + self._corner, params[:, 2].copy()

    def close(self) -> None:
        """Stop DALI's threads and free its buffers. The loader cannot be used afterwards."""
        self._pipeline = None
        self._source.inputs = iter(())


class _Source:
    """What DALI asks for its next inputs."""

    inputs: Iterator[Any] = iter(())

    def __call__(self) -> Any:
        return next(self.inputs)


def _require_dali() -> Any:
    found = attempt("nvidia.dali", "nvidia.dali.fn", "nvidia.dali.types")
    if found.module is None:
        raise DataError(
            f"loader dali needs NVIDIA DALI, which {found.why}: "
            f"{found.cure('nvidia-dali-cuda130', 'dali')}, or take data.loader resident"
        )
    return found.module


def _pipeline(
    source: _Source,
    *,
    batch_size: int,
    threads: int,
    device: torch.device,
    shape: tuple[int, int, int],
    reflect: int,
    decode: bool,
) -> Any:
    """A built pipeline from (samples, corner (2,), flip) to uint8 (B, H, W, C)."""
    dali = _require_dali()
    fn, types = dali.fn, dali.types
    gpu = device.type == "cuda"
    height, width, channels = shape
    pipeline = dali.Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index if device.index is not None else torch.cuda.current_device()) if gpu else None,
        prefetch_queue_depth=_PREFETCH,
        exec_dynamic=True,
    )
    with pipeline:
        image, corner, flip = fn.external_source(
            source=source,
            num_outputs=3,
            layout=["" if decode else "HWC", "", ""],
            ndim=[1 if decode else 3, 1, 0],
            dtype=[types.UINT8, types.INT32, types.INT32],
        )
        if decode:
            kind = types.RGB if channels == 3 else types.GRAY
            backend = "mixed" if gpu else "cpu"
            image = fn.decoders.image(image, device=backend, output_type=kind, adjust_orientation=False)
        elif gpu:
            image = image.gpu()
        if reflect:
            image = _reflect(fn, image, reflect, height, width)
        image = fn.slice(
            image, start=corner, shape=[height, width], axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
        )
        pipeline.set_outputs(fn.flip(image, horizontal=flip))
    pipeline.build()
    return pipeline


def _reflect(fn: Any, image: Any, pad: int, height: int, width: int) -> Any:
    """The image with a border of `pad` mirrored pixels; the edge itself is not repeated."""
    for axis, size in ((0, height), (1, width)):
        turn = {"vertical": 1 - axis, "horizontal": axis}
        before = fn.flip(fn.slice(image, start=[1], shape=[pad], axes=[axis]), **turn)
        after = fn.flip(fn.slice(image, start=[size - 1 - pad], shape=[pad], axes=[axis]), **turn)
        image = fn.cat(before, image, after, axis=axis)
    return image
