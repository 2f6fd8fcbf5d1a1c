"""AutoAttack's verdicts, image by image: this project's beside pyautoattack's own on the plain model.

    python bench/verdicts.py runs/a runs/b --json bench/results/verdicts-cpu.json

The models of the committed result are trained by bench/verdict_models.py, which has the whole command, too.
For each model and attack (aa, aa-l2, and each part alone) pyautoattack attacks the model itself, in full float32,
and mwpb-fast's evaluation does what it does: it searches on the folded twin, and the model judges. Both draw from
the same seeds. A row has the number of images whose flags differ and, of each, its number in the test set and who
found it adversarial. Where there are some, pyautoattack attacks the same model once more, its weights in the
other memory layout: what then differs is how far rounding alone moves its own verdict. Rows are
written as they come; the same command goes on. Verdicts are kept in --kept, so that several processes can make
them (--prepare): pyautoattack's, which hang on no code of this project's, and the shards of this commit's.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch
from measure import command_line, commit, full_float32, settled, write_content
from peers import package
from record import Results, leave_at_sigterm, read_content
from torch import Tensor, nn

from mwpb_fast.config import EvaluationConfig
from mwpb_fast.evaluation.autoattack import COMPONENTS, STANDARD, TARGETS, for_classes
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.evaluation.checkpoint import Subject
from mwpb_fast.evaluation.evaluate import attack_all
from mwpb_fast.evaluation.model_checks import hash_model, weights_frozen
from mwpb_fast.evaluation.request import Request
from mwpb_fast.evaluation.sharded import bits, split
from mwpb_fast.system.optional import version_of

PARTS = {"aa": STANDARD, "aa-l2": STANDARD} | {name: (name,) for name in ("apgd-ce", "apgd-t", "square")}
PARTS["fab"] = ("fab-t",)
COLUMNS = (
    ("model", "model", ""),
    ("attack", "attack", ""),
    ("eps", "eps", ""),
    ("images", "images", "d"),
    ("natural", "natural, %", ".1f"),
    ("robust", "right under it, %", ".1f"),
    ("differ", "flags that differ", "d"),
    ("rounding", "pyautoattack's own, by its layout", ""),
)


def pyautoattack(model: nn.Module, x: Tensor, y: Tensor, attack: str, eps: float, seed: int) -> str:
    """The flags of its standard version, or of one part of it, on the images of one shard."""
    module, asked = package("pyautoattack"), find_attack(attack)
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    norm = "L2" if asked.norm == "l2" else "Linf"
    adversary = module.AutoAttack(
        model, norm=norm, eps=float(asked.eps or eps), seed=seed, version="standard", device=x.device
    )
    targets = min(TARGETS, classes - 1)
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
    adversary.attacks_to_run = for_classes(classes, PARTS[attack])
    for name in adversary.attacks_to_run:
        for option, value in COMPONENTS[name].parameters.items():
            setattr(getattr(adversary, COMPONENTS[name].name), option, value)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    with weights_frozen(model), full_float32():
        _, predicted = adversary.run_standard_evaluation(x, y, batch_size=EvaluationConfig().batch_size)
    return bits(predicted == y)


class Model:
    """One run or file: its images, and the two verdicts on them."""

    def __init__(self, target: Path, images: int, o: argparse.Namespace) -> None:
        self.o, self.name = o, target.stem if target.is_file() else target.name
        self.subject = Subject(Request(target, data_dir=o.data_dir, device=str(o.device), show=False))
        self.config = dataclasses.replace(self.subject.evaluation, attacks=("natural", *o.attacks), subset=images)
        self.subject.evaluation = self.config
        self.index = self.subject.session().index

    def laid(self, layout: torch.memory_format) -> nn.Module:
        """The model, its weights in that layout."""
        model: Any = self.subject.model
        laid: nn.Module = model.to(memory_format=layout)
        return laid

    def theirs(self, attack: str, layout: torch.memory_format) -> str:
        """pyautoattack's flags; kept beside the result."""
        session = self.subject.session()
        model = self.laid(layout)
        about: list[Any] = [hash_model(model), session.data_hash, attack, str(layout), str(self.config.eps)]
        about += [version_of("pyautoattack")]
        about += [str(torch.__version__), str(self.o.device), torch.get_num_threads()]
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        path = self.o.kept_in / f"{name}.json"
        if found := read_content(path):
            return str(found["flags"])
        flags, eps = "", float(self.config.eps)
        for part in split(self.index):
            x, y = session.load(part)
            seed = ops.derive_seed(session.setting.seed, int(part[0]))
            flags += pyautoattack(model, x.contiguous(), y, attack, eps, seed)
        write_content(path, {"model": self.name, "attack": attack, "layout": str(layout), "flags": flags})
        return flags

    def ours(self, attack: str) -> dict[str, Any]:
        """The entry of mwpb-fast's own result."""
        asked = dataclasses.replace(self.config, attacks=("natural", attack))
        self.subject.evaluation = asked
        self.subject.results = self.o.kept_in / f"{self.name}-{commit().replace(' ', '-')}"
        self.laid(torch.channels_last)
        found: dict[str, Any] = attack_all(self.subject.session(), show=False)["attacks"]
        return found[attack] | {"natural": found["natural"]["accuracy"]}

    def row(self, attack: str) -> dict[str, Any]:
        theirs, ours = self.theirs(attack, torch.channels_last), self.ours(attack)
        differing = [
            {"image": image, "adversarial for": "mwpb-fast" if mine == "0" else "pyautoattack"}
            for image, mine, other in zip(self.index.tolist(), ours["flags"], theirs, strict=True)
            if mine != other
        ]
        row: dict[str, Any] = {"model": self.name, "attack": attack, "eps": f"{ours['norm']} {ours['eps']}"}
        row |= {"images": len(theirs), "natural": ours["natural"]}
        row |= {"robust": ours["accuracy"], "robust_theirs": 100 * theirs.count("1") / len(theirs)}
        row |= {"engine": ours["engine"], "refuted": ours["refuted"], "rounding": "-"}
        if differing:
            again = self.theirs(attack, torch.contiguous_format)
            row["rounding"] = str(sum(a != b for a, b in zip(theirs, again, strict=True)))
        return row | {"differ": len(differing), "differing": differing, "flags": ours["flags"]}


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("targets", type=Path, nargs="+", metavar="RUN|FILE")
    parser.add_argument("--attacks", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--images", type=int, nargs="+", default=[250], help="of each test set, stratified")
    parser.add_argument("--data-dir", type=Path, help="holds the prepared data sets")
    parser.add_argument("--kept", type=Path, dest="kept_in", help="where verdicts are kept, outside the results")
    parser.add_argument("--prepare", action="store_true", help="make those and no result")
    o = settled(parser.parse_args(arguments))
    leave_at_sigterm()
    o.kept_in = o.kept_in or Path("runs/verdicts")
    each = o.images * len(o.targets) if len(o.images) == 1 else o.images
    models = [Model(target, images, o) for target, images in zip(o.targets, each, strict=True)]
    if o.prepare:
        for attack in o.attacks:
            for model in models:
                clock = [time.process_time()]
                model.theirs(attack, torch.channels_last)
                clock.append(time.process_time())
                model.ours(attack)
                clock.append(time.process_time())
                theirs, ours = clock[1] - clock[0], clock[2] - clock[1]
                print(f"{model.name}: {attack}: {theirs:.0f} s of CPU, ours {ours:.0f}", flush=True)
        return
    parts = {f"{model.name}: {attack}": (model, attack) for attack in o.attacks for model in models}
    results = Results(o.json, o.device, COLUMNS, parts, images_of_each=o.images)
    for part in list(results.unfinished):
        model, attack = parts[part]
        row = model.row(attack)
        results.put(part, [row])
        print(f"{part}: {row['differ']} of {row['images']} flags differ, robust {row['robust']:.1f} %", flush=True)


if __name__ == "__main__":
    main()
