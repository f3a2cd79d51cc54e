"""What nvcc makes of the CUDA kernels: registers, shared memory, blocks a multiprocessor, instructions.

``python tests/sass.py`` prints a table of all kernels.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cusim.build import CUDA_HOME, ROOT, cached, compilers, nvcc, text_of

SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10}  # bytes of a multiprocessor
RESERVED = 1 << 10  # bytes of it that each block costs


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: ``threads`` of its launch bounds (1024 if it has none), bytes of static ``shared`` memory."""

    name: str
    architecture: str
    registers: int
    shared: int
    threads: int
    instructions: frozenset[str]

    @property
    def blocks(self) -> int:
        """Blocks of ``threads`` that a multiprocessor holds at once, without dynamic shared memory."""
        warps = -(-self.threads // 32)
        warps_by_registers = 4 * (16384 // (-(-self.registers * 32 // 256) * 256))  # in each of the 4 quarters
        by_memory = SHARED_MEMORY[self.architecture] // (self.shared + RESERVED)
        return min(32, 64 // warps, warps_by_registers // warps, by_memory)

    def has(self, pattern: str) -> bool:
        """Whether some instruction matches, as ``LDG.*128``."""
        return any(re.match(pattern, instruction) for instruction in self.instructions)


def cuobjdump() -> str | None:
    """The toolkit's, or that of PyTorch's triton."""
    triton = importlib.util.find_spec("triton")
    places = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    found = (shutil.which(place / "cuobjdump") for place in [CUDA_HOME / "bin", *places])
    return shutil.which("cuobjdump") or next(filter(None, found), None)


def compile_all() -> dict[tuple[Path, str], Future[Path]]:
    """A cubin for each source and architecture; ``CompileError`` for warnings, spills and local memory as well."""
    with ThreadPoolExecutor(compilers()) as pool:
        jobs = [(source, architecture) for source in SOURCES for architecture in SHARED_MEMORY]
        return {job: pool.submit(compile_kernels, *job) for job in jobs}


def compile_kernels(source: Path, architecture: str) -> Path:
    checks = ("-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror", "-Werror", "all-warnings")
    command = (
        nvcc() or "nvcc",
        "-cubin",
        "-std=c++17",
        "-O3",
        "-DPIXCONTRAST_WITH_CUDA",
        f"-I{ROOT / 'csrc'}",
        f"-arch={architecture}",
        *checks,
    )
    room = source.parent.name if source.stem == "cuda" else source.stem
    return cached(f"{room}-{architecture}.cubin", (*command, str(source)), text_of(source))


@cache
def kernels(cubin: Path, architecture: str) -> list[Kernel]:
    usage = re.findall(r"Function (\S+):\n\s*REG:(\d+) STACK:\d+ SHARED:(\d+)", _dump(cubin, "-res-usage"))
    bounds = {
        name: int(threads, 16)
        for name, threads in re.findall(
            r"^\.nv\.info\.(\S+)$(?:(?!^\.nv\.info).)*?EIATTR_MAX_THREADS\n.*?Value:\s*(0x\w+)",
            _dump(cubin, "-elf"),
            re.MULTILINE | re.DOTALL,
        )
    }
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", _dump(cubin, "-sass"), re.DOTALL))
    reserved = RESERVED if architecture == "sm_90" else 0  # which the dump may count there
    return [
        Kernel(
            name,
            architecture,
            int(registers),
            max(int(shared) - reserved, 0),
            bounds.get(name, 1024),
            frozenset(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code[name])),
        )
        for name, registers, shared in usage
    ]


def _dump(cubin: Path, what: str) -> str:
    return subprocess.run([str(cuobjdump()), what, str(cubin)], capture_output=True, text=True, check=True).stdout


def table(found: list[Kernel]) -> str:
    names = subprocess.run(["c++filt"], input="\n".join(k.name for k in found), capture_output=True, text=True).stdout
    lines = ["| kernel | architecture | registers | static shared | threads | blocks/SM |", "|---|---|---|---|---|---|"]
    for name, k in zip(names.splitlines(), found, strict=True):
        short = re.sub(r"^void |pixcontrast::(cuda::)?|\(anonymous namespace\)::|\([^)]*\)$", "", name)
        cells = (short, k.architecture, k.registers, k.shared, k.threads, k.blocks)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    cubins = compile_all()
    print(table([kernel for (_, arch), cubin in cubins.items() for kernel in kernels(cubin.result(), arch)]))
