"""The gathered FFN's kernels compile for Hopper, without a GPU, to the machine code that their block sizes count on."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from masquerade_kernels import gathered_ffn
from masquerade_kernels.gathered_blocks import choose_blocks

HOPPER = GPUTarget("cuda", 90, 32)
NUM_SMS = 132
SHARED_BYTES = 228 * 1024  # a multiprocessor, of which every program takes 1 KiB beside its own
REGISTERS = 65536
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
KERNELS = ("gate_up_kernel", "down_kernel", "sum_splits_kernel")


@dataclass
class Launch:
    """What `launch` asked of one kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * (self.grid[2] if len(self.grid) == 3 else 1)

    def compile(self) -> Compiled:
        """As triton specialises it at the call: pointers on 16 bytes, and multiples of 16 where they are looked at."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            divisible = isinstance(value, torch.Tensor) and not parameter.do_not_specialize_on_alignment
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[(index,)] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{TRITON_NAMES[value.dtype]}"
            else:
                signature[parameter.name] = "i32"
                divisible = not parameter.do_not_specialize and value % 16 == 0
            if divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        made = triton.compile(source, target=HOPPER, options=self.options)
        return Compiled(made.asm["ptx"], made.asm["cubin"], made.metadata.shared, 32 * self.options["num_warps"])


TRITON_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass
class Compiled:
    ptx: str
    cubin: bytes
    shared: int
    threads: int

    def usage(self, directory: Path) -> dict[str, int]:
        """Registers a thread, and bytes of stack and local memory (spills), by the disassembler."""
        (directory / "kernel.cubin").write_bytes(self.cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        listed = subprocess.run(
            [tool, "-res-usage", str(directory / "kernel.cubin")], capture_output=True, text=True, check=True
        )
        return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listed.stdout)}

    def resident(self, registers: int) -> int:
        """Programs that fit on one multiprocessor together."""
        return min(SHARED_BYTES // (self.shared + 1024), REGISTERS // (registers * self.threads), 2048 // self.threads)


@dataclass
class Recorder:
    """Stands where a kernel is and launches nothing."""

    kernel: Any
    launches: list[Launch] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def record(*given: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in OPTIONS if name in named}
            arguments = dict(zip(self.kernel.arg_names, given, strict=False)) | named
            self.launches.append(Launch(self.kernel, grid, arguments, options))

        return record


def launches(
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    kept: int,
    intermediate: int,
    hidden: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    columns: int | None = 0,
) -> list[Launch]:
    """What one segment launches on a GPU, in order; `columns` of coefficients are |U| if 0, and None without any."""
    recorders = {name: Recorder(getattr(gathered_ffn, name)) for name in KERNELS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(gathered_ffn, name, recorder)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = tensor(intermediate, hidden)
    gathered_ffn.launch(
        tensor(tokens, hidden),
        weights,
        weights,
        weights,
        tensor(kept, dtype=torch.int32),
        None if columns is None else tensor(5, columns or kept, dtype=torch.float32),
        tensor(tokens, dtype=torch.int64),
        tensor(5, hidden, dtype=torch.float32),
        tensor(tokens, hidden),
        choose_blocks(tokens, kept, hidden, itemsize=dtype.itemsize, num_sms=NUM_SMS),
    )
    return [launch for name in KERNELS for launch in recorders[name].launches]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.mark.parametrize(
    ("tokens", "kept", "intermediate", "hidden"),
    [
        pytest.param(1, 4096, 8192, 3072, id="3B, 50 %, one token"),
        pytest.param(16, 6144, 8192, 3072, id="3B, 25 %, 16 tokens"),
        pytest.param(16, 14336, 14336, 4096, id="8B, every neuron, 16 tokens"),
        pytest.param(32, 10752, 14336, 4096, id="8B, 25 %, 32 tokens"),
        pytest.param(64, 10752, 14336, 4096, id="8B, 25 %, 64 tokens"),
        pytest.param(128, 8192, 8192, 3072, id="3B, every neuron, 128 tokens"),
    ],
)
def test_weights_are_streamed_in_one_wave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: int, kept: int, intermediate: int, hidden: int
) -> None:
    gate_up, down, sum_splits = launches(monkeypatch, tokens, kept, intermediate, hidden)
    for launch in (gate_up, down):
        compiled = launch.compile()
        usage = compiled.usage(tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0, "registers are spilled"
        assert launch.programs <= NUM_SMS * compiled.resident(usage["REG"])
        assert re.search(r"cp\.async\.cg\.shared\.global.*0x10", compiled.ptx), "no 16-byte copies past the registers"
        assert "ld.global.b16" not in compiled.ptx, "values are loaded one by one"
        assert "L2::evict_first" in compiled.ptx
        assert "mma" in compiled.ptx
    assert "ld.global.v4" in sum_splits.compile().ptx


def test_many_tokens_fit_a_multiprocessor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for launch in launches(monkeypatch, 300, 10001, 14336, 4096):
        compiled = launch.compile()
        usage = compiled.usage(tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0
        assert compiled.resident(usage["REG"]) >= 1
        assert "ld.global.b16" not in compiled.ptx


@pytest.mark.parametrize(
    ("dtype", "columns"),
    [(torch.float16, 33), (torch.bfloat16, 97), (torch.bfloat16, None), (torch.float32, 33)],
    ids=["float16", "coefficients by neuron", "no coefficients", "float32"],
)
def test_odd_sizes_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype, columns: int | None
) -> None:
    for launch in launches(monkeypatch, 3, 33, 97, 45, dtype, columns=columns):
        compiled = launch.compile()
        assert compiled.usage(tmp_path)["LOCAL"] == 0
        assert "tf32" not in compiled.ptx, "float32 sums are exact to float32"
