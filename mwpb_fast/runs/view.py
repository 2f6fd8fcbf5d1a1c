"""How a run shows itself while it works: lines and a live view for people, objects for programs, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mwpb_fast.config import Config, to_dict
from mwpb_fast.runs.log import Progress, epoch_line, note, radius_text
from mwpb_fast.runs.tracker import Tracker
from mwpb_fast.system.files import to_json
from mwpb_fast.system.lazy import torch
from mwpb_fast.system.units import counted, duration

Form = Literal["lines", "json", "quiet"]


@dataclass
class View:
    """form: lines, a live view where standard error is a terminal; json, an object a line on standard output, with
    its kind as "event"; or quiet. track: package of a tracker that gets the records too, see `tracker`. warning:
    what is said on standard error as a run begins."""

    form: Form = "lines"
    track: str = ""
    warning: str = ""
    _accuracies: str = field(default="", init=False)
    _beside: float = field(default=0.0, init=False)

    def tell(self, line: str, event: str, **about: Any) -> None:
        """A line for people, which are the same facts as an event for programs."""
        if self.form == "json":
            print(to_json({"event": event, **about}), flush=True)
        elif self.form == "lines":
            print(line, flush=True)

    def begin(self, config: Config, folder: Path, images: int, device: str, done: int, checkpoint: str) -> None:
        """What is trained, where, and from where it goes on. images: that it is trained on. done: epochs that are.
        checkpoint: with which the run goes on; empty for a new one."""
        epochs, warmup = config.epochs, config.warmup_epochs
        if checkpoint and done >= epochs:
            then = "a larger --epochs goes on, --no-resume begins anew"
            line = f"already complete: {folder} has done {counted(done, 'epoch')}; {then}"
            self.tell(line, "complete", folder=str(folder), epochs=done)
            return
        about = {"recipe": config.recipe, "model": config.model.name, "data": config.data.name, "images": images}
        about |= {"device": device, "epochs": epochs, "warmup_epochs": warmup, "folder": str(folder)}
        line = f"training {config.recipe}: {config.model.name} on {images:,} images of {config.data.name}"
        first = f" ({warmup} of them warm-up)" if 0 < warmup < epochs else ""
        self.tell(f"{line}, on {device}, for {counted(epochs, 'epoch')}{first}, into {folder}", "start", **about)
        if self.warning:
            note(f"NOTE: {self.warning}")
        if checkpoint:
            self.tell(f"resuming from {checkpoint}", "resumed", checkpoint=checkpoint)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """An epoch is done."""
        self._beside = record.get("validation", 0.0) + record.get("checkpoint", 0.0)
        if "robust" in record:
            self._accuracies = f"natural {record['natural']:.1f} % robust {record['robust']:.1f} %"
        self.tell(epoch_line(record, epochs), "epoch", epochs=epochs, **record)

    def result(self, result: dict[str, Any], as_text: Callable[[dict[str, Any]], str]) -> None:
        """What the run came to, which is told in quiet too; programs get it without what is of each image."""
        if self.form != "json":
            print(as_text(result))
            return
        attacks = {name: _short(entry) for name, entry in result["attacks"].items()}
        about = {k: result[k] for k in ("n", "eps", "norm", "preview", "warnings")}
        if "worst" in result:
            about["worst"] = _short(result["worst"])
        self.tell("", "evaluation", attacks=attacks, **about)

    def step(self, bar: Progress, row: torch.Tensor, epochs_left: int) -> tuple[str, str]:
        """Of a step's row of the trace, for which this waits: its loss; and a line with its radii, the last
        accuracies, memory, and the time that the run has left, if each epoch to come takes what this one does."""
        loss, low, mean, high = row[:4].tolist()
        images = bar.total - bar.done + epochs_left * bar.total
        left = ""
        if bar.rate:  # not before the first step of a bar is counted
            left = f"run: {duration(images / bar.rate + (epochs_left + 1) * self._beside)} left"
        parts = [f"loss {loss:.3f}", radius_text(low, mean, high), self._accuracies, memory(row.device)]
        return parts[0], ", ".join(filter(None, [*parts, left]))

    def tracker(self, folder: Path, config: Config) -> Tracker | None:
        """Where the records go too; None where nobody asked, or where it does not start, which is told."""
        if not self.track:
            return None
        try:
            return Tracker(self.track, folder, to_dict(config))
        except Exception as error:  # of the service: the network, the login, ...
            note(f"no records for {self.track}: {' '.join(str(error).split())}")
            return None


def _short(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("accuracy", "interval", "norm", "eps") if key in entry}


def memory(device: torch.device) -> str:
    """What a run holds of a CUDA device's memory; empty elsewhere. Asks PyTorch, and not the device."""
    if device.type != "cuda":
        return ""
    held, whole = torch.cuda.memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    return f"GPU {held / 2**30:.1f} of {whole / 2**30:.0f} GiB"
