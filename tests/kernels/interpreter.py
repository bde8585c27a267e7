"""Triton kernels on a CPU: its interpreter and its compiler side by side in one process.

Triton decides when a function is decorated whether it is compiled or interpreted, its own library included, so one set
of imported modules serves only one of the two. Here a process keeps two sets and puts one of them in place:

    from tests.kernels.interpreter import interpreted, triton_modules  # noqa: F401

    @pytest.mark.usefixtures("interpreted")    # or `pytestmark = ...` for a whole file
    def test_kernel(): ...                     # imports kernels, or calls host code that does, inside the test

    with triton_modules(interpret=False): ...  # what `aot` does to compile

What swaps is triton itself and every module of `swin_scale.kernels` that has it in its names. So a test takes kernels
from an import inside the function, and host code imports them where it launches them. A file that both holds kernels
and registers operators registers them again when it is first loaded in the other set.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch

VARIABLE = "TRITON_INTERPRET"
KERNELS = "swin_scale.kernels"


@cache
def _kept(interpret: bool) -> dict[str, ModuleType]:
    """The modules of one set while the other is in place."""
    return {}


def _of_triton(name: str, module: ModuleType | None) -> bool:
    # The compiled library knows nothing of the choice, and cannot be loaded twice.
    if name.partition(".")[0] == "triton":
        return not name.startswith("triton._C")
    return name.startswith(f"{KERNELS}.") and any(key in vars(module) for key in ("triton", "tl"))


def _take_out() -> dict[str, ModuleType]:
    taken = {name: module for name, module in sys.modules.items() if _of_triton(name, module)}
    for name in taken:
        del sys.modules[name]
        package, _, leaf = name.rpartition(".")
        if package == KERNELS:
            vars(sys.modules[package]).pop(leaf, None)
    return taken


def _put_in(modules: dict[str, ModuleType]) -> None:
    sys.modules.update(modules)
    for name, module in modules.items():
        package, _, leaf = name.rpartition(".")
        if package == KERNELS:
            setattr(sys.modules[package], leaf, module)


def _is_interpreting() -> bool | None:
    """What the modules in place were loaded for; None when there are none."""
    triton = sys.modules.get("triton")
    if triton is None:
        return None
    return type(triton.language.sum).__name__ == "InterpretedFunction"


def _quicken() -> None:
    """Halve the interpreter's time: no check of every sum of integers for overflow, no patching at calls of helpers.

    It replaces the functions of Triton's library at each call of a function from a kernel, most of them in vain.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch, done = interpreter._patch_lang, set[int]()

    def patch_once(fn: Any) -> Any:
        libraries = {
            id(value) for value in fn.__globals__.values() if value is interpreter.tl or value is interpreter.tl.core
        }
        if libraries <= done:
            return None
        scope = patch(fn)
        restore = scope.restore
        done.update(libraries)

        def restored() -> None:
            restore()
            done.difference_update(libraries)

        scope.restore = restored
        return scope

    interpreter._patch_lang = patch_once


@contextmanager
def triton_modules(*, interpret: bool) -> Iterator[None]:
    """Inside, Triton interprets (or compiles), the environment variable included; afterwards all is as before."""
    before, was = os.environ.get(VARIABLE), _is_interpreting()
    os.environ[VARIABLE] = str(int(interpret))
    if was is not interpret:
        if was is not None:
            _kept(was).update(_take_out())
        _put_in(_kept(interpret))
        importlib.import_module("triton")
        if interpret and not _kept(True):
            _quicken()
    try:
        yield
    finally:
        if was is not None and was is not interpret:
            _kept(interpret).update(_take_out())
            _put_in(_kept(was))
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


@pytest.fixture
def interpreted() -> Iterator[None]:
    """The test runs under Triton's interpreter, and memory that nobody has written yet reads as NaN."""
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with triton_modules(interpret=True):
        # Besides its name, this mode fills what torch.empty and its kin return: NaN, or the largest integer.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
