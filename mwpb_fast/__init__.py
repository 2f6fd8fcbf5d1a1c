"""Adversarial training with margin-weighted perturbation budgets, at full speed.

The command is `mwpb-fast`; `mwpb-fast --help` lists what it does. From Python:

- `mwpb_fast.evaluation.evaluate.evaluate` attacks any model or function; `mwpb_fast.evaluation.score.format_table`
  shows what it found.
- `mwpb_fast.config.recipe("digits.mwpb_at")` is a recipe's configuration, and `mwpb_fast.train.run` trains it.
- `mwpb_fast.models.build_model("resnet-18", num_classes=10)` builds a model; `load_weights` beside it reads
  a file's weights.
- `mwpb_fast.data.prepare`, `load_split` and `make_loader` are the data sets.
- `mwpb_fast.step.Step` is one training step of a loop of your own. Its parts, each module with a `Config` whose
  `build()` makes it, are in `mwpb_fast.budgets`, `attacks`, `objectives` and `perturbations`. Parts of your own
  inherit from the classes of `mwpb_fast.method`.
- `mwpb_kernels`, a package of its own, is the fused ops.

`help()` of each says what it takes. The repository's docs/ has examples, and says what of this is public and kept.
"""
