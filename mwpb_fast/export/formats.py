"""The forms of a model: how each is written, read back, and described."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mwpb_fast.config import ConfigError
from mwpb_fast.export import FORMATS
from mwpb_fast.export.robustbench import counterpart, field_state, how_to_load
from mwpb_fast.export.source import Source
from mwpb_fast.models import build_model, load_weights, read_checkpoint
from mwpb_fast.system.files import sync
from mwpb_fast.system.optional import attempt

Run = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [0, 1], float32 -> logits (B, classes)


class ExportError(RuntimeError):
    """What was written does not compute what the model does, or could not be written; one line."""


@dataclass(frozen=True)
class Form:
    """write: the model to a file. read: that file as what computes. loading: Python that loads it, for its users;
    {file} stands for its name. refuse: raises ConfigError where the form cannot be, before anything is written."""

    write: Callable[[Source, Path], None]
    read: Callable[[Source, Path], Run]
    loading: Callable[[Source], str]
    refuse: Callable[[Source], object] = lambda source: None


def export(source: Source, name: str, path: Path) -> Form:
    """Write the model in the form `name` to `path`, once what was written has been read back and gives the model's
    logits on random images. Raises ConfigError and ExportError; then `path` is as it was."""
    form = FORMS[name]
    form.refuse(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    trial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{FORMATS[name]}")
    try:
        try:
            with _silence():
                form.write(source, trial)
                run = form.read(source, trial)
            check(source, run)
        except (ExportError, OSError, MemoryError):
            raise
        except Exception as error:  # a compiler, or code of the user's: either may raise anything
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(f"{source.config.model.name} cannot be exported to {name}: {first}") from error
        os.replace(trial, path)
    finally:
        trial.unlink(missing_ok=True)
    sync(path.parent)
    return form


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without PyTorch's warnings of its own insides, and of torchvision, which nothing here needs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@torch.no_grad()
def check(source: Source, run: Run) -> None:
    """Hold what was read back to the model, on several images and on one: both are as far from the model
    in float64 as rounding takes them. Raises ExportError."""
    generator = torch.Generator().manual_seed(0)
    truth = copy.deepcopy(source.model).double()
    for count in (5, 1):
        x = torch.rand(count, source.channels, *source.size, generator=generator)
        exact, own, found = truth(x.double()), source.model(x), run(x)
        if not bool(exact.isfinite().all()):
            raise ExportError(f"{source.path.name}: the model's own logits are not finite")
        if found.shape != own.shape:
            raise ExportError(f"what was written gives {tuple(found.shape)}, the model {tuple(own.shape)}")
        bound = 8 * (own - exact).abs().max() + 1e-6 * exact.abs().max()
        off = (found - exact).abs().max()
        if not bool(off <= bound):
            raise ExportError(f"what was written is off by {off:.2g} in the logits; rounding explains {bound:.2g}")


def example(source: Source) -> Tensor:
    return torch.rand(2, source.channels, *source.size)


# weights ---------------------------------------------------------------------------------------------------------
def _write_safetensors(source: Source, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in source.model.state_dict().items()}
    if source.normalize is not None:
        for kind, values in zip(("mean", "std"), source.normalize, strict=True):
            tensors[f"normalize.{kind}"] = torch.tensor(values).view(1, -1, 1, 1)
    save_file(tensors, path, {"format": "pt", "model": source.config.model.name, "recipe": source.config.recipe})


def _read_weights(source: Source, path: Path) -> Run:
    """Into a model that knows nothing of the source but its architecture: normalisation is the file's."""
    model = build_model(source.config.model.name, num_classes=len(source.classes), channels=source.channels)
    load_weights(model, read_checkpoint(path))
    return model.eval()


def _load_safetensors(source: Source) -> str:
    name, classes = source.config.model.name, len(source.classes)
    return (
        "from mwpb_fast.models import build_model, load_weights, read_checkpoint\n\n"
        f'model = build_model("{name}", num_classes={classes}, channels={source.channels}).eval()\n'
        'load_weights(model, read_checkpoint("{file}"))'
    )


def _write_robustbench(source: Source, path: Path) -> None:
    torch.save(field_state(source), path)


# programs --------------------------------------------------------------------------------------------------------
def _program(source: Source) -> torch.export.ExportedProgram:
    """Of a batch of any number of images of the run's size."""
    with torch.no_grad():
        batch = torch.export.Dim("batch")
        return torch.export.export(source.model, (example(source),), dynamic_shapes=({0: batch},))


def _write_program(source: Source, path: Path) -> None:
    torch.export.save(_program(source), path)


def _read_program(source: Source, path: Path) -> Run:
    module: nn.Module = torch.export.load(path).module()
    return module


def _load_program(source: Source) -> str:
    return 'import torch\n\nmodel = torch.export.load("{file}").module()  # in eval mode, for any batch size'


def _require_onnx(source: Source | None = None) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        found = attempt(name)
        if found.module is None:
            raise ConfigError(f"--format onnx needs {name}, which {found.why}: {found.cure(name, 'export')}")


def _write_onnx(source: Source, path: Path) -> None:
    program = torch.onnx.export(
        _program(source),
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=False)  # one file


def _read_onnx(source: Source, path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def _load_onnx(source: Source) -> str:
    return (
        "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])\n'
        '(logits,) = session.run(["logits"], {{"images": x}})  # x: float32, any batch size'
    )


FORMS = {
    "safetensors": Form(_write_safetensors, _read_weights, _load_safetensors),
    "robustbench": Form(_write_robustbench, _read_weights, how_to_load, counterpart),
    "torch-export": Form(_write_program, _read_program, _load_program),
    "onnx": Form(_write_onnx, _read_onnx, _load_onnx, _require_onnx),
}
