"""Kernels compiled ahead of time for chips that are not here: registers, spills, shared memory, Triton's IR.

with aot.compiling(), aot.recording(module, "kernel") as calls:
    host_function(meta_tensors...)          # launches nothing: each call of the kernel is kept
figures = aot.compile_call(calls[0], capability=90)
"""

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.kernels.interpreter import triton_modules

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that one program may have: A100, H100 and H200, B200."""
TARGETS = tuple(SHARED_LIMIT)
LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one compiled kernel takes of a chip."""

    registers: int
    """A thread's."""
    spilled: int
    """Bytes of stack and local memory a thread has; a kernel that keeps to its registers has none."""
    shared: int
    """Bytes a program has."""
    ttir: str = field(repr=False)
    """Triton's own intermediate code, in which dots carry their precision."""

    def problems(self, capability: int) -> list[str]:
        """Why the kernel should not ship for this chip; nothing when it may."""
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} B")
        if self.shared > SHARED_LIMIT[capability]:
            found.append(f"{self.shared} B of shared memory, over {SHARED_LIMIT[capability]}")
        if "tf32" in self.ttir:
            found.append("dots in TF32")
        return found


@dataclass(frozen=True, kw_only=True)
class Call:
    """A launch that was asked for: the kernel, its grid, its arguments by name and Triton's options."""

    kernel: Any
    grid: Sequence[int]
    arguments: Mapping[str, Any]
    options: Mapping[str, int]

    def key(self) -> str:
        """Equal for calls that compile to the same code."""
        signature, constants, attributes = describe(self.kernel, self.arguments)
        return repr((self.kernel.__name__, signature, constants, attributes, sorted(self.options.items())))


class _Recorder:
    def __init__(self, kernel: Any, calls: list[Call]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: Sequence[int]) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, args)) | kwargs
            options = {key: arguments.pop(key) for key in LAUNCH_OPTIONS if key in arguments}
            self.calls.append(Call(kernel=self.kernel, grid=tuple(grid), arguments=arguments, options=options))

        return call


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, kernels that are imported can be compiled."""
    with triton_modules(interpret=False):
        yield


@contextmanager
def recording(*modules: ModuleType) -> Iterator[list[Call]]:
    """Inside, launches of the kernels of `modules` are kept in the list instead of run."""
    from triton.runtime.jit import JITFunction

    calls: list[Call] = []
    kernels = [(m, name, value) for m in modules for name, value in vars(m).items() if isinstance(value, JITFunction)]
    for module, name, kernel in kernels:
        setattr(module, name, _Recorder(kernel, calls))
    try:
        yield calls
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def describe(kernel: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[tuple, list]]:
    """Signature, constants and attributes, as the launcher would specialise them for these arguments.

    Tensors count as aligned to 16 bytes and integers that 16 divides as such; None and the integer 1 become constants.
    """
    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments.get(parameter.name, parameter.default)
        aligned = False
        if parameter.is_constexpr or value is None or (_specialised(parameter, value) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned = _POINTERS[value.dtype], True
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        else:
            assert isinstance(value, float), f"{name}: no signature for {value!r}"
            signature[name] = "fp32"
        if aligned:
            attributes[(at,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _specialised(parameter: Any, value: Any) -> bool:
    return type(value) is int and not parameter.do_not_specialize


def compile_call(call: Call, capability: int) -> Figures:
    """Compile a recorded call for a CUDA chip of compute capability 8.0, 9.0 or 10.0 (80, 90, 100)."""
    signature, constants, attributes = describe(call.kernel, call.arguments)
    return compile_kernel(call.kernel, signature, constants, capability, attributes=attributes, **call.options)


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    attributes: Mapping[tuple, list] | None = None,
    **options: int,
) -> Figures:
    """Compile `kernel` for a chip. `signature` gives each argument's type, such as `*fp16`, `i32` or `constexpr`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=kernel, signature=dict(signature), constexprs=dict(constants), attrs=dict(attributes or {}))
    target = GPUTarget("cuda", capability, 32)
    # Said, because Triton is about to change what it does unasked.
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    usage = _resource_usage(compiled.asm["cubin"])
    return Figures(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=max(compiled.metadata.shared, usage["SHARED"]),
        ttir=compiled.asm["ttir"],
    )


def summary(what: str, capability: int, kernels: Collection[Figures]) -> str:
    """The line of a proof: how much of the chip the kernels of `what` take at most."""
    registers, shared, spilled = (max(getattr(k, key) for k in kernels) for key in ("registers", "shared", "spilled"))
    most = f"at most {registers} registers, {shared >> 10} of {SHARED_LIMIT[capability] >> 10} KiB shared"
    return f"proof: {what}, sm_{capability}: {len(kernels)} kernels, {most}, {spilled} B spilled"


def _resource_usage(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
