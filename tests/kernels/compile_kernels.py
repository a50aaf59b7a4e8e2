"""Compile the Triton kernels for a GPU that need not be there; a process of its own, as tests interpret kernels.

python compile_kernels.py FOLDER_OF_CUOBJDUMP '[[kernel, precision, sm, tiles or null], ...]' writes a list as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mlcd_ds.clustering.triton_nearest import tile_maxima_kernel
from mlcd_ds.heads.triton_exp import exp_block_kernel
from mlcd_ds.kernels.triton_product import NUM_WARPS, tile_shape

KERNELS = {"exp_block": exp_block_kernel, "tile_maxima": tile_maxima_kernel}
NUMBERS = {"slots_ptr": "*i64", "factors_ptr": "*fp32", "sums_ptr": "*fp32", "halves_ptr": "*fp32"} | {
    "maxima_ptr": "*fp32",
    "shift": "fp32",
}
CONSTANTS = {"num_labels": 8, "has_factors": False, "has_halves": True}


def type_of(name: str, precision: str) -> str:
    """Triton's type of an argument."""
    if name.startswith("block_") or name in CONSTANTS:
        return "constexpr"
    return NUMBERS.get(name, f"*{precision}" if name.endswith("_ptr") else "i32")


def compiled(name: str, precision: str, sm: int, tiles: list[int] | None) -> dict[str, object]:
    """What cuobjdump says of the registers and the stack, bytes of shared memory, PTX."""
    kernel = KERNELS[name]
    types = {argument: type_of(argument, precision) for argument in kernel.arg_names}
    blocks = [argument for argument in types if argument.startswith("block_")]
    constants = CONSTANTS | dict(zip(blocks, tiles or tile_shape(precision == "bf16"), strict=True))
    place = {argument: (number,) for number, argument in enumerate(types)}
    source = ASTSource(
        kernel,
        types,
        {place[argument]: constants[argument] for argument, kind in types.items() if kind == "constexpr"},
        # As the JIT specialises: addresses and sizes are multiples of 16.
        {place[argument]: [["tt.divisibility", 16]] for argument, kind in types.items() if kind[0] in "*i"},
    )
    result = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": NUM_WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [str(Path(sys.argv[1], "cuobjdump")), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"usage": usage, "shared": result.metadata.shared, "ptx": result.asm["ptx"]}


if __name__ == "__main__":
    sys.stdout.write(json.dumps([compiled(*case) for case in json.loads(sys.argv[2])]) + "\n")
