"""An op: the entropy of each row of logits, in plain PyTorch for every device and in Triton for CUDA."""

import torch
from mwpb_kernels.op import Op, check_logits, tl, triton
from mwpb_kernels.rows import (
    load_logits,
    logit_samples,
    row_bytes,
    row_compile,
    row_fake,
    run_rows,
    softmax_rows,
    tile,
)


@torch.no_grad()
def reference(logits: torch.Tensor) -> torch.Tensor:
    log_p = logits.to(row_fake(logits).dtype).log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


@triton.jit
def _kernel(out_ptr, logits_ptr, batch, classes, stride_b, stride_c, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column, inside = tile(batch, classes, ROWS, BLOCK)
    z = load_logits(logits_ptr, row, column, inside, stride_b, stride_c)
    e, total, top = softmax_rows(z, inside)
    above = tl.where(inside, z - top[:, None], 0.0)
    tl.store(out_ptr + row, tl.log(total) - tl.sum(e * above, 1) / total, mask=row < batch)


OP = Op(
    schema="entropy(Tensor logits) -> Tensor",
    reference=reference,
    fake=row_fake,
    triton=lambda logits: run_rows(_kernel, row_fake(logits), logits),
    samples=lambda device: ((logits,) for logits, _ in logit_samples(device)),
    bytes_moved=row_bytes,
    compiles=row_compile(_kernel, out_ptr="*fp32"),
    native=False,  # a C++ file would be a second one; the reference serves the CPU
)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """(B,) the entropy of softmax(logits), in nats; a constant. logits: (B, C)."""
    check_logits(logits)
    return OP(logits)
