"""Pickles read as data: the opcodes are interpreted, nothing they name is imported, built or called.

Training checkpoints of other projects are pickles, and often hold more than tensors (the official Swin ones carry a
yacs config). Here a class stays an inert `Placeholder`, a tensor becomes a `LazyTensor` that says where its bytes lie,
and a call of anything outside a short list of known-harmless ones is refused by name. `pickle` is not used at all, so
no setting and no retry can turn this into a load that runs code.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from swin_scale.errors import CheckpointError

MAX_PICKLE_BYTES = 8 << 20
"""Longest pickle read (tensor bytes are stored outside): about 50,000 tensors. Needs up to 25 times as much memory."""


@dataclass(frozen=True)
class Global:
    """A name the pickle refers to; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Placeholder:
    """What would have been an object of class `type`: its arguments, state and items, as plain data."""

    type: Global
    args: Any = None
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes in the file that tensors are views of; `type` is the storage class, `numel` counts its elements."""

    type: str
    key: str
    numel: int


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A view of a storage; `dtype` is given when the storage is untyped. Sizes and strides are unchecked."""

    storage: Storage
    offset: Any
    shape: Any
    stride: Any
    dtype: str | None = None


# Modules whose mere mention means that the file wants to act.
_ACTING = {
    "asyncio", "bdb", "code", "codeop", "commands", "ctypes", "distutils", "functools", "importlib", "marshal",
    "multiprocessing", "nt", "operator", "os", "pdb", "pickle", "pip", "platform", "posix", "profile", "pty", "pydoc",
    "runpy", "shutil", "signal", "site", "socket", "ssl", "subprocess", "sys", "tempfile", "threading", "timeit",
    "torch.hub", "urllib", "webbrowser", "zipfile",
}  # fmt: skip
_ACTING_BUILTINS = {
    "__import__", "breakpoint", "compile", "delattr", "eval", "exec", "getattr", "input", "open", "setattr",
}  # fmt: skip

# Calls that are kept as inert placeholders, so that what surrounds the weights does not stop them from loading.
_HARMLESS_CALLS = {
    "torch.Size", "torch.device", "torch.torch_version.TorchVersion", "_codecs.encode",
    "copyreg._reconstructor", "copy_reg._reconstructor", "numpy.dtype",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "builtins.set", "builtins.frozenset", "builtins.bytearray", "builtins.complex", "builtins.slice",
    "__builtin__.set", "__builtin__.frozenset", "__builtin__.bytearray", "__builtin__.complex",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath",
    "datetime.datetime", "datetime.date", "datetime.timedelta", "types.SimpleNamespace",
}  # fmt: skip
_RECORDS = "deepspeed."
"""DeepSpeed's checkpoints build its enums and loss scalers; they become placeholders like any other object."""


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> LazyTensor:
    return _typed_tensor(storage, offset, shape, stride, None, None, None)


def _typed_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> LazyTensor:
    _grad, _hooks, dtype, *_ = rest
    if not isinstance(storage, Storage) or not isinstance(dtype, (Global, type(None))):
        raise ValueError("a tensor is made of something else than a storage and a dtype")
    return LazyTensor(storage, offset, shape, stride, None if dtype is None else str(dtype))


def _mapping(*args: Any) -> dict[Any, Any]:
    pairs = args[-1] if args and isinstance(args[-1], (list, dict)) else {}
    table: dict[Any, Any] = {}
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        _put(table, key, value)
    return table


def _tensor_of_type(function: Any, _type: Any, args: Any, *_: Any) -> Any:
    """What torch writes for a tensor of a subclass or with attributes: how to make the tensor, and both of these."""
    if str(function) not in _CALLS or not isinstance(function, Global) or not isinstance(args, tuple):
        raise ValueError(f"a tensor is made by {str(function)[:80]}")
    return _CALLS[str(function)](*args)


_CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
}

_PUSH_ARGUMENT = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_PUSH_CONSTANT: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}


class _Window:
    """At most `limit` bytes of a stream, for `pickletools`, which would follow any length a pickle states."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.stream, self.left = stream, limit

    def read(self, count: int) -> bytes:
        self._take(count)
        return self.stream.read(count)

    def readline(self) -> bytes:
        line = self.stream.readline(self.left + 1)
        self._take(len(line))
        return line

    def _take(self, count: int) -> None:
        self.left -= count
        if count < 0 or self.left < 0:
            raise ValueError(f"it is longer than {MAX_PICKLE_BYTES} bytes")


def read_pickle(stream: BinaryIO, path: Path) -> tuple[Any, set[str]]:
    """The object described by the pickle that starts here, as data, and the names of the classes it mentions.

    Leaves `stream` after the pickle. Dicts, lists, tuples and scalars are themselves; sets are lists; classes are
    `Placeholder`; tensors are `LazyTensor`. Raises CheckpointError naming the file for anything that would have to be
    called, and for damage.
    """
    machine = _Machine(path)
    try:
        window = _Window(stream, MAX_PICKLE_BYTES)
        return machine.run(pickletools.genops(window)), machine.mentioned  # type: ignore[arg-type]
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error, OverflowError) as error:
        raise CheckpointError(f"{path} is not a readable pickle: {error}") from error


def _put(table: dict[Any, Any], key: Any, value: Any) -> None:
    # Hashing a nested tuple that shares its parts can take exponential time, as can printing one.
    if not isinstance(key, (str, int, float, bool, bytes, type(None))):
        raise ValueError(f"a table has a key of type {type(key).__name__}")
    if isinstance(key, int) and key.bit_length() > 64:
        raise ValueError("a table has a number of more than 64 bits as key")
    table[key] = value


class _Machine:
    """The pickle virtual machine over plain data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.mentioned: set[str] = set()

    def run(self, operations: Iterator[tuple[Any, Any, Any]]) -> Any:
        for opcode, argument, _ in operations:
            name = opcode.name
            if name in _PUSH_ARGUMENT:
                self.stack.append(argument)
            elif name in _PUSH_CONSTANT:
                self.stack.append(_PUSH_CONSTANT[name]())
            elif name in ("PROTO", "FRAME"):
                continue
            elif name == "STOP":
                return self.stack.pop()
            else:
                handler = getattr(self, f"_op_{name.lower()}", None)
                if handler is None:
                    raise ValueError(f"opcode {name} is not supported")
                handler(argument)
        raise ValueError("it ends without STOP")

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _op_mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _op_pop(self, _: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def _op_pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _op_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _op_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _last(self, count: int) -> None:
        items = tuple(self.stack.pop() for _ in range(count))
        self.stack.append(items[::-1])

    def _op_tuple1(self, _: Any) -> None:
        self._last(1)

    def _op_tuple2(self, _: Any) -> None:
        self._last(2)

    def _op_tuple3(self, _: Any) -> None:
        self._last(3)

    def _op_list(self, _: Any) -> None:
        self.stack.append(self._since_mark())

    _op_frozenset = _op_list

    def _op_dict(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append({})
        self._set_items(items)

    def _op_append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _op_appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    _op_additems = _op_appends

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        target = target.elements if isinstance(target, Placeholder) else target
        if not isinstance(target, list):
            raise ValueError(f"elements are added to {type(target).__name__}")
        target.extend(items)

    def _op_setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _op_setitems(self, _: Any) -> None:
        self._set_items(self._since_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        target = target.items if isinstance(target, Placeholder) else target
        if not isinstance(target, dict):
            raise ValueError(f"items are set on {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(target, key, value)

    def _op_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _op_binput = _op_long_binput = _op_put

    def _op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _op_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _op_binget = _op_long_binget = _op_get

    def _name(self, module: str, name: str) -> Global:
        named = Global(module, name)
        first = module.partition(".")[0]
        acts = first in _ACTING or module in _ACTING
        if acts or (first in ("builtins", "__builtin__") and name in _ACTING_BUILTINS):
            raise CheckpointError(f"{self.path} refers to {named}, which could run code; refused, nothing was run")
        self.mentioned.add(str(named))
        return named

    def _op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self._name(module, name))

    def _op_stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global is not named by text")
        self.stack.append(self._name(module, name))

    def _op_reduce(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        name = str(function) if isinstance(function, Global) else f"a {type(function).__name__}"
        if name in _CALLS:
            self.stack.append(_CALLS[name](*args))
        elif name in _HARMLESS_CALLS or name.startswith(_RECORDS):
            self.stack.append(Placeholder(function, args))
        else:
            raise CheckpointError(f"{self.path} wants to call {name}; refused, nothing was run")

    def _build_placeholder(self, cls: Any, args: Any) -> None:
        if not isinstance(cls, Global):
            raise ValueError(f"an object is made of a {type(cls).__name__}")
        self.stack.append({} if str(cls) == "collections.OrderedDict" else Placeholder(cls, args))

    def _op_newobj(self, _: Any) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self._build_placeholder(cls, args)

    def _op_newobj_ex(self, _: Any) -> None:
        keywords, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self._build_placeholder(cls, (args, keywords))

    def _op_obj(self, _: Any) -> None:
        cls, *args = self._since_mark()
        self._build_placeholder(cls, tuple(args))

    def _op_inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._build_placeholder(self._name(module, name), tuple(self._since_mark()))

    def _op_build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Placeholder):
            target.state = state
        elif not isinstance(target, (dict, LazyTensor)):  # state of these two: attributes, such as _metadata
            raise ValueError(f"state is set on {type(target).__name__}")

    def _op_binpersid(self, _: Any) -> None:
        match self.stack.pop():
            case ("storage", Global() as kind, str(key), _, int(numel)) if numel >= 0:
                self.stack.append(Storage(kind.name, key, numel))
            case ("storage", Global() as kind, str(key), _, int(numel), None) if numel >= 0:
                self.stack.append(Storage(kind.name, key, numel))
            case _:
                raise ValueError("a persistent id is not one of a storage")
