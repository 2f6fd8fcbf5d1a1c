"""Compiles every Triton kernel of the package for GPUs that are not there, and reports what the compiler says.

Run as a script, without TRITON_INTERPRET: `python ahead_of_time.py PART PARTS` compiles every PARTS-th entry and
prints one JSON object a line: op, kernel, arch, types, registers, stack and spill bytes, 32-bit offsets, and the
integers that must not be 1.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mwpb_kernels
import triton
from mwpb_kernels.op import OPS, Compile
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

ARCHITECTURES = (80, 90, 100)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def resources(asm: dict[str, Any], arch: int) -> dict[str, int]:
    """Registers a thread, stack bytes and spilled bytes, from the machine code itself.

    A kernel without a stack has spilled nothing. Where there is one, the assembler is asked how much of it is
    spills and how much the kernel's own arrays.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(asm["cubin"])
        usage = run(BIN / "cuobjdump", "--dump-resource-usage", cubin)
        registers, stack, local = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK", "LOCAL"))
        spilled = 0
        if stack or local:
            ptx.write_text(asm["ptx"])
            target = re.search(r"^\.target (\w+)", asm["ptx"], re.MULTILINE)[1]
            newer = BIN / "ptxas-blackwell"
            assembler = newer if arch >= 100 and newer.exists() else BIN / "ptxas"
            report = run(assembler, "-v", f"--gpu-name={target}", ptx, "-o", cubin)
            spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    return {"registers": registers, "stack": stack + local, "spilled": spilled}


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def narrow_products(ttir: str) -> list[str]:
    """Products in 32 bits from which an address is made, as lines of Triton's own intermediate code.

    Follows the offset of every pointer addition back through the arithmetic. A program's number or a stride
    multiplied in 32 bits wraps for a tensor of more than 2^31 elements, even if it is widened afterwards. Sizes
    of one sample may be multiplied; quotients, remainders and what is loaded from memory are positions.
    """
    made_by = {}
    sizes = {a for a in re.findall(r"(%\w+): i32", ttir.split("attributes")[0]) if "stride" not in a}
    for line in ttir.splitlines():
        found = re.match(r"\s*(%[\w#]+)(?::\d+)? = \"?([\w.]+)\"?(.*)", line)
        if found:
            made_by[found[1]] = (found[2], re.sub(r" loc\(.*", "", found[3]), line.strip())
    follow = ("arith.addi", "arith.subi", "arith.muli", "arith.extsi", "arith.extui", "arith.select", "arith.shli")
    shape = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.addptr")
    bad, seen = [], set()

    def walk(name: str) -> None:
        if name in seen or name not in made_by:
            return
        seen.add(name)
        kind, rest, line = made_by[name]
        operands = re.findall(r"%[\w#]+", rest)
        narrow = re.search(r":.*\bi32>?\s*$", rest) or re.search(r"xi32>?\s*$", rest)
        if kind in ("arith.muli", "arith.shli") and narrow and any(varies(o, set()) for o in operands):
            bad.append(line)
        if kind in follow + shape:
            for operand in operands[1:] if kind == "tt.addptr" else operands:
                walk(operand)

    def varies(name: str, visited: set[str]) -> bool:
        """Whether a value comes from a program's number, a stride or a loop, and not from sizes and ranges."""
        if name in visited or name in sizes:
            return False
        visited.add(name)
        if name not in made_by:
            return True  # a stride, or a loop's variable
        kind, rest, _ = made_by[name]
        if kind in ("arith.remsi", "arith.remui"):  # at most the modulus, which is a size of one sample
            return False
        return kind == "tt.get_program_id" or any(varies(o, visited) for o in re.findall(r"%[\w#]+", rest))

    for kind, rest, _ in made_by.values():
        if kind == "tt.addptr":
            walk(re.findall(r"%[\w#]+", rest)[1])
    return bad


def source_of(entry: Compile, ones: tuple[str, ...] = ()) -> ASTSource:
    """The kernel with its types; `ones` are integers of which each is 1, hence a constant."""
    names = entry.kernel.arg_names
    unknown = (set(entry.signature) | set(entry.constants)) - set(names)
    missing = set(names) - set(entry.signature) - set(entry.constants)
    assert not unknown | missing, f"{entry.kernel.__name__}: unknown {unknown}, missing {missing}"
    types = {n: t for n, t in entry.signature.items() if n not in ones}
    return ASTSource(
        fn=entry.kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs=entry.constants | dict.fromkeys(ones, 1),
    )


def compile_entry(entry: Compile, arch: int) -> Any:
    options = {"num_warps": entry.num_warps}
    return triton.compile(source_of(entry), target=GPUTarget("cuda", arch, 32), options=options)


def refused_ones(entry: Compile) -> list[str]:
    """With which integers 1, each alone and all at once, the kernel is not even lowered, and why.

    A launch makes a constant of an integer that is 1, and a constant has no methods such as `.to`.
    """
    integers = tuple(n for n, t in entry.signature.items() if t in ("i32", "i64"))
    target = GPUTarget("cuda", ARCHITECTURES[0], 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": entry.num_warps})
    refused = []
    for ones in ((integers,) if integers else ()) + tuple((n,) for n in integers):
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        generators, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        try:
            source_of(entry, ones).make_ir(target, options, generators, modules, context)
        except Exception as error:
            refused.append(f"{', '.join(ones)}: {error} {error.__cause__ or ''}")
    return refused


def main(part: int, parts: int) -> None:
    for module in pkgutil.iter_modules(mwpb_kernels.__path__):
        if not module.name.startswith("lib"):
            importlib.import_module(f"mwpb_kernels.{module.name}")
    assert not mwpb_kernels.triton_problem  # asked, it puts Triton's own kernels into the entries
    entries = [(op.name, entry) for _, op in sorted(OPS.items()) for entry in op.compiles]
    for op, entry in entries[part::parts]:
        types = {k: str(v) for k, v in (*entry.signature.items(), *entry.constants.items())}
        for arch in ARCHITECTURES:
            compiled = compile_entry(entry, arch)
            record = dict(op=op, kernel=entry.kernel.__name__, arch=arch, types=types, limit=entry.max_registers)
            record |= resources(compiled.asm, arch)
            if arch == ARCHITECTURES[0]:
                record["narrow"] = narrow_products(compiled.asm["ttir"])
                record["ones"] = refused_ones(entry)
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
