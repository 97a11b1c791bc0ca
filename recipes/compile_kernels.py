"""Compile every Triton kernel configuration for GPUs that need not be here, and print what each one takes there.

Command:   python recipes/compile_kernels.py
Data:      none. Hardware: any CPU; the compiler, the assembler and the disassembler are inside the triton package.
Time:      about half a second for each configuration and architecture on one core.
Prints:    a Markdown table: registers and stack of a thread, shared memory of a program, matrix instructions (HMMA on
           sm_80, HGMMA on sm_90), and what is wrong; ends with an error when anything is. `tests/kernels/
           test_triton_compiles.py` asserts the same.
"""

from __future__ import annotations

import argparse
import sys

from mmtok.kernels.triton.inspect_variant import MATRIX_INSTRUCTION, all_variants, compile_variants

HEADINGS = ("configuration", "target", "registers", "stack bytes", "shared KiB", "matrix instructions", "wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configurations whose name starts with this")
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=[80, 90], choices=sorted(MATRIX_INSTRUCTION), help="sm_..."
    )
    parser.add_argument("--smoke", action="store_true", help="two configurations")
    args = parser.parse_args()
    variants = [variant for variant in all_variants() if variant.name.startswith(args.only)]
    if not variants:
        raise SystemExit(f"--only {args.only!r}: no configuration starts so; leave it out to see their names")
    print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
    wrong = 0
    for c in compile_variants(variants[:2] if args.smoke else variants, args.architectures):
        matrix = f"{c.matrix_instructions} {MATRIX_INSTRUCTION[c.architecture]}" if c.matrix_instructions else "-"
        faults = "; ".join(c.faults())
        wrong += bool(faults)
        cells = (c.variant.name, f"sm_{c.architecture}", c.registers, c.stack, f"{c.shared / 1024:.1f}", matrix, faults)
        print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
    if wrong:
        sys.exit(f"{wrong} configurations must not be shipped, see the last column")


if __name__ == "__main__":
    main()
