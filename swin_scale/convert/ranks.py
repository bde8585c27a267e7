"""Weights of an official Swin-MoE, put together from the files of its ranks (see `rank_files` and `experts`).

At the end of training the official code writes the experts of each rank to ``NAME.rank{r}`` and everything else to
``NAME.master``; while it trains, every ``.rank{r}`` is the whole state dict of its rank. Both are read, from Tutel of
any version. Experts frozen without a second bias have it in ``.master``, that of rank 0 for all: it is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from swin_scale.convert import experts
from swin_scale.convert.experts import Placing
from swin_scale.convert.rank_files import find
from swin_scale.convert.torch_weights import TorchWeights
from swin_scale.convert.weights import Source, Step, Weights
from swin_scale.errors import CheckpointError

_COPY = "on every rank, that of rank 0 is taken"


@dataclass(frozen=True)
class _Layer:
    """What the gate of one layer and its first weights tell."""

    placing: Placing
    channels: int
    hidden: int

    def part(self, name: str) -> tuple[int, ...]:
        return experts.part_shape(name, self.placing, self.channels, self.hidden)

    def whole(self, name: str) -> tuple[int, ...]:
        return experts.whole_shape(name, self.placing, self.channels, self.hidden)


class RankWeights(Weights):
    """The whole model. Keys of the files are ``rank3/KEY`` and ``master/KEY`` in `steps` and `left_out`.

    Raises CheckpointError naming the file for missing ranks, experts that do not add up, impossible shapes, and all
    that `rank_files.find` and `TorchWeights` refuse.
    """

    def __init__(self, path: Path, kind: str) -> None:
        with ExitStack() as stack:
            found = find(path, stack)
            if found is None:
                raise CheckpointError(f"{path}: there are no .rank files")
            self._set = found
            named = {f"rank{rank}": file for rank, file in enumerate(found.ranks)}
            if found.master is not None:
                named["master"] = found.master
            self._files = {label: self._open(file, kind, stack) for label, file in named.items()}
            self.bytes = sum(file.stat().st_size for file in named.values())
            self._put_together()
            self._stack = stack.pop_all()

    def _open(self, file: Path, kind: str, stack: ExitStack) -> TorchWeights:
        try:
            weights = TorchWeights(file, kind)
        except CheckpointError as error:
            raise self._named(error, file) from error
        stack.callback(weights.close)
        return weights

    def _named(self, error: CheckpointError, file: Path) -> CheckpointError:
        """`error` with the member of the zip in place of the file it was unpacked to."""
        if file.parent == self._set.path:
            return error
        return CheckpointError(str(error).replace(str(file), self._set.name(file.name)))

    def _put_together(self) -> None:
        files, self.left_out = self._files, {}
        self._label = self._check_keys()
        self._shared = {key: files[label].tensors[key] for key, label in self._label.items()}
        for label, file in files.items():
            for key in file.tensors:
                if key.endswith(experts.COUNT):
                    experts.check_count(file, key, self._shared, self._set.name(label))
                    self.left_out[f"{label}/{key}"] = experts.COUNT_REASON
                elif self._label.get(key, label) != label:
                    self.left_out[f"{label}/{key}"] = "as in .master" if "master" in files else _COPY
        self._layers = {key: self._layer(key) for key in (*files["rank0"].tensors, *self._shared) if experts.match(key)}
        steps, tensors = [], {}
        for key, tensor in files["rank0"].tensors.items():
            if (found := experts.match(key)) is not None:
                shape = self._check_parts(key, found[1])
                steps.append(self._joining(key, shape))
                tensors[key] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        for key, tensor in self._shared.items():
            step, shape = Step((f"{self._label[key]}/{key}",), (key,)), tuple(tensor.shape)
            if (found := experts.match(key)) is not None:
                shape = self._check_frozen(key, found[1])
                step = Step(step.sources, (key,), partial(_zeros, shape=shape), "frozen at zero in all experts")
            steps.append(step)
            tensors[key] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        self.steps, self.tensors = steps, tensors
        self.source = self._describe()

    def _check_keys(self) -> dict[str, str]:
        """Key of everything but experts of ranks -> the file it is read from."""
        own: dict[str, set[str]] = {}
        rest: dict[str, set[str]] = {}
        for label, file in self._files.items():
            keys = {key for key in file.tensors if not key.endswith(experts.COUNT)}
            own[label] = {key for key in keys if experts.match(key)}
            rest[label] = keys - own[label]
        for label in list(own)[1:]:
            if label == "master":
                odd = own["rank0"] & own["master"]
            else:
                odd = (own["rank0"] ^ own[label]) | (rest["rank0"] ^ rest[label])
            if odd:
                where = "in both" if label == "master" else "in one of them only"
                raise CheckpointError(
                    f"{self._set.name(label)} and .rank0 are not of one model: {min(odd)} is {where}; replace one"
                )
        labels = {key: "rank0" for key in self._files["rank0"].tensors if key in rest["rank0"]}
        if "master" in self._files:
            wanted = rest["master"] | own["master"]
            labels |= {key: "master" for key in self._files["master"].tensors if key in wanted}
        if not labels:
            raise CheckpointError(
                f"{self._set.name('master')} is missing: the .rank files hold experts only, it everything else; add it"
            )
        return labels

    def _layer(self, key: str) -> _Layer:
        """The layer of an expert's `key`; raises CheckpointError where its experts do not add up."""
        prefix = (experts.match(key) or ("", ""))[0]
        total, channels = experts.gate_sizes(self._shared, prefix, self._set.name(""))
        placing = Placing(total, len(self._set.ranks))
        if not placing.fits:
            raise CheckpointError(
                f"{self._set.name(f'rank{placing.ranks}')} may be missing: there are {placing.ranks} .rank files, the "
                f"gate at {prefix} is for {total} experts, and one number must divide the other"
            )
        hidden = experts.hidden_units(self._files["rank0"].tensors, prefix, placing, channels)
        dense = next((t for k, t in self._shared.items() if k.endswith(".mlp.fc1.weight") and t.dim() == 2), None)
        if dense is not None and placing.sharing > 1 and hidden * dense.shape[1] != channels * dense.shape[0]:
            raise CheckpointError(
                f"{self._set.name(f'rank{placing.ranks}')} may be missing: {placing.ranks} .rank files make experts of "
                f"{hidden} hidden units for {channels} channels at {prefix}, the dense blocks have {dense.shape[0]} "
                f"for {dense.shape[1]}"
            )
        return _Layer(placing, channels, hidden)

    def _check_parts(self, key: str, name: str) -> tuple[int, ...]:
        """The whole shape of an expert's tensor of which every rank has a part; raises CheckpointError."""
        layer, dtype = self._layers[key], self._files["rank0"].tensors[key].dtype
        wanted, placing = layer.part(name), layer.placing
        for rank in range(placing.ranks):
            tensor = self._files[f"rank{rank}"].tensors[key]
            if not experts.is_part(name, tensor.shape, wanted, placing) or tensor.dtype != dtype:
                raise CheckpointError(
                    f"{self._set.name(f'rank{rank}')}: {key} is {tensor.dtype} of shape {tuple(tensor.shape)}, but "
                    f"{placing.experts} experts of {layer.channels} channels on {placing.ranks} ranks make it {dtype} "
                    f"of {wanted}; files are missing or of another model"
                )
        return layer.whole(name)

    def _check_frozen(self, key: str, name: str) -> tuple[int, ...]:
        """The whole shape of a second bias of which the master file has rank 0's, if that is zero."""
        layer, tensor, where = self._layers[key], self._shared[key], self._set.name("master")
        if name != "batched_fc2_bias" or not experts.is_part(name, tensor.shape, layer.part(name), layer.placing):
            raise CheckpointError(
                f"{where}: {key} of shape {tuple(tensor.shape)} belongs into the .rank files; fetch them as published"
            )
        if self._value("master", key).any():
            raise CheckpointError(
                f"{where}: {key} is not zero, and no .rank file has it: those of the other ranks are lost; save it "
                "again with the biases trained, or frozen at zero"
            )
        return layer.whole(name)

    def _joining(self, key: str, shape: tuple[int, ...]) -> Step:
        placing = self._layers[key].placing
        sources = tuple(f"rank{rank}/{key}" for rank in range(placing.ranks))
        if placing.ranks == 1 and tuple(self._files["rank0"].tensors[key].shape) == shape:
            return Step(sources, (key,))
        if placing.sharing > 1:
            reason = f"{placing.experts} experts, each of {placing.sharing} ranks' slices"
        else:
            reason = f"{placing.experts} experts of {placing.ranks} rank{'s' * (placing.ranks > 1)}"
        return Step(sources, (key,), experts.joining(shape), reason)

    def _describe(self) -> Source:
        found, files = self._set, self._files.values()
        notes = [f"official files of {len(found.ranks)} ranks" + (" and master" if found.master else "")]
        for placing in dict.fromkeys(layer.placing for layer in self._layers.values()):
            each = f"each on {placing.sharing} ranks" if placing.sharing > 1 else f"{placing.local} on each rank"
            notes.append(f"{placing.experts} experts, {each}")
        if drifted := self._drifted():
            notes.append(
                f"{drifted} shared tensors differ between ranks, as official training lets them; rank 0's count"
            )
        return Source(
            path=found.path if found.path.is_file() else found.path / found.stem,
            format="ranks",
            kind=self._files["rank0"].source.kind,
            beside=tuple(dict.fromkeys([*(name for file in files for name in file.source.beside), *found.others])),
            mentioned=tuple(sorted({name for file in files for name in file.source.mentioned})),
            notes=tuple(notes),
        )

    def _drifted(self) -> int:
        """Tensors of all ranks whose checksums, where the files state them, are not the same."""
        differing = 0
        for key, label in self._label.items():
            mine = self._files[label].checksum(key)
            copies = (file.checksum(key) for file in self._files.values() if key in file.tensors)
            differing += mine is not None and any(copy not in (mine, None) for copy in copies)
        return differing

    def read(self, name: str) -> Tensor:
        if name in self._layers:
            return self.rows(name, 0, len(self.tensors[name]))
        return self._value(self._label[name], name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._layers:
            return super().rows(name, start, stop)
        if name in self._shared:
            return torch.zeros_like(self.tensors[name][start:stop], device="cpu")
        placing, rest = self._layers[name].placing, self.tensors[name].shape[1:]
        first, last = placing.ranks_of(start, stop)
        begin, end = (rank // placing.sharing * placing.local for rank in (first, last))
        parts = [self._value(f"rank{rank}", name) for rank in range(first, last)]
        return experts.join(parts, shape=(end - begin, *rest))[start - begin : stop - begin]

    def _value(self, label: str, key: str) -> Tensor:
        file = self._files[label]
        try:
            return file.read(key)
        except CheckpointError as error:
            raise self._named(error, file.source.path) from error

    def close(self) -> None:
        self._stack.close()


def _zeros(values: Sequence[Tensor], *, shape: tuple[int, ...]) -> Sequence[Tensor]:
    return [values[0].new_zeros(shape)]
