"""Megatron checkpoints under one set of names: stacked or per layer, TE's or local layers'.

Megatron stores the equal layers of a homogeneous model as one tensor with a leading layer
dimension (`decoder.layers.mlp.linear_fc2.weight`), those of a heterogeneous one each under its own
name (`decoder.layers.7.mlp.linear_fc2.weight`). Everything else in the bridge knows only the
latter; this module is where the former is folded and unfolded. Local layers call their norms
`input_layernorm` and `pre_mlp_layernorm` where nothing renames them; wrappers put `module.` or
`model.` before every name. Those become the names of the parameter table too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, Self

from bridge.dtypes import Dtype, Words
from bridge.errors import CorruptFileError, DtypeMismatchError
from bridge.parameters import Parameter
from bridge.record import SIDE_DIRECTORY
from bridge.spec import MAX_LAYERS, ModelSpec, ParallelLayout
from bridge.storage.extents import Extent
from bridge.storage.input_files import refuse_link_out
from bridge.storage.remote import Location
from bridge.storage.source import FileLayout, Payload, TensorInfo
from bridge.storage.torch_dist_iteration import RELEASE, open_checkpoint, open_reader
from bridge.storage.torch_dist_write import (
    CheckpointLayout,
    Chunk,
    empty_extra_state,
    extra_state_key,
    layout_checkpoint,
)
from bridge.storage.torch_legacy_ranks import args_of
from bridge.tiling import Box, Shape

_WRAPPERS: Final = re.compile(r"(?:module\.|model\.)*")
# Beside the model. Whatever is not known to be is of the model, for the accounting to name.
_BESIDE: Final = re.compile(
    r"(?:chained_\d+\.)?"
    r"(?:optimizer|optimizer_states?|opt_param_scheduler|lr_schedulers?|rng_state|"
    r"rerun_state_machine_state|dataloader_state_dict|callbacks|loops)(?:[./].*)?"
    r"|.*\._extra_state(?:/.*)?"
)
_PER_LAYER: Final = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.*)")
_STACKED: Final = re.compile(r"decoder\.layers\.(?P<rest>\D.*)")

# Modules whose (empty) state object strict loaders ask for; TE layers store quantisation there.
_LINEAR_SUFFIXES: Final = (
    "linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight",
    "self_attention.weight", "mlp.weight",
)  # fmt: skip
_FINAL_NORM: Final = "decoder.final_layernorm"


_LOCAL_NORMS: Final = {
    "input_layernorm": ("self_attention.linear_qkv", "self_attention"),
    "pre_mlp_layernorm": ("mlp.linear_fc1", "mlp"),
}
"""Norms of local layers, and the modules one of which is there to consume them: the first has
the norm of ordinary blocks, the second that of linear replacements."""


class MegatronSource:
    """The model parameters of a `torch_dist` or `torch` checkpoint, whole and per layer.

    Args:
        path: The checkpoint's root (with its tracker file) or one of its iteration directories.

    Attributes:
        root: The directory that holds the tracker and, for our own imports, the record.
        iteration: As the tracker or the directory says; 0 for `release`.
        args: The `args` of `common.pt` as a mapping, None when there are none.
        ignored: What else is in the checkpoint and not read, one line each.
        notes: What is odd about it, one line each.

    Raises:
        CheckpointError: BR300, not a checkpoint.
        CorruptFileError: BR302, files that contradict the metadata.
    """

    def __init__(self, path: Location) -> None:
        self.directory, self.iteration = open_checkpoint(path.absolute())
        self.root = self.directory.parent
        refuse_link_out(self.root / SIDE_DIRECTORY)  # whose files are carried into an export
        # Optimizer state is far bigger than the model; nothing of it is even looked at.
        self._reader = open_reader(self.directory, ignore=_is_beside)
        try:
            self._read_tables()
        except BaseException:
            self.close()
            raise

    def _read_tables(self) -> None:
        """What the checkpoint holds, by the names of the parameter table."""
        common = self._reader.common()
        self.args_where = f"{self.directory}: args"
        self.args = args_of(common, where=self.args_where)
        self.notes = _notes_on_iteration(common.get("iteration"), self.directory, self.iteration)
        self._stored: dict[str, tuple[str, int | None]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        names = _table_names(self._reader.tensors)
        for key, stored_name in names.items():
            info = self._reader.tensors[key]
            for name, layer_idx, shape in _unfold(stored_name, info.shape, self.directory):
                if name in self._stored:
                    raise CorruptFileError(
                        f"{name} is stored as {self._stored[name][0]} and as {key}",
                        where=str(self.directory),
                    )
                self._stored[name] = key, layer_idx
                self.tensors[name] = TensorInfo(shape=shape, dtype=info.dtype)
        self.ignored = [
            f"{kind}{f' ({nbytes / 1e9:.3g} GB)' if nbytes else ''}, not part of the model"
            for kind, nbytes in sorted(self._reader.ignored_nbytes.items())
        ]

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Fill `out` with a box; see `TensorSource`."""
        key, place = self._place(name, box)
        self._reader.read_into(key, place, out if len(place.starts) == out.ndim else out[None])

    def extents(self, name: str, box: Box) -> list[Extent] | None:
        """Where a box lies; see `bridge.storage.extents.FileSource`."""
        return self._reader.extents(*self._place(name, box))

    def _place(self, name: str, box: Box) -> tuple[str, Box]:
        """The key that holds a parameter, and where in it the box is."""
        key, layer_idx = self._stored[name]
        if layer_idx is None:
            return key, box
        return key, Box((layer_idx, *box.starts), (layer_idx + 1, *box.stops))

    def close(self) -> None:
        """Release the files."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_beside(key: str) -> bool:
    return _BESIDE.fullmatch(key) is not None


def _notes_on_iteration(said: object, directory: Location, iteration: int) -> list[str]:
    """Name a directory that was renamed, or filled with another save than it says."""
    if directory.name == RELEASE or not isinstance(said, int) or said == iteration:
        return []
    return [f"{directory.name} says of itself that it is of iteration {said}"]


def _table_names(keys: Collection[str]) -> dict[str, str]:
    """Key to its name in the parameter table, layers still stacked; of the model's tensors only."""
    names = {key: _WRAPPERS.sub("", key, count=1) for key in keys if not _is_beside(key)}
    present = set(names.values())
    for key, name in names.items():
        layer, _, rest = name.rpartition(".weight")[0].rpartition(".")
        for consumer in _LOCAL_NORMS.get(rest, ()):
            if f"{layer}.{consumer}.weight" in present:
                names[key] = f"{layer}.{consumer}.layer_norm_weight"
                break
    return names


def _unfold(
    name: str, shape: Shape, directory: Location
) -> Iterator[tuple[str, int | None, Shape]]:
    match = _STACKED.fullmatch(name)
    if match is None:
        yield name, None, shape
        return
    # Nothing bounds the layers of a tensor without elements: it takes no bytes, whatever its shape.
    if 0 in shape or not 1 <= (shape[0] if shape else 0) <= MAX_LAYERS:
        raise CorruptFileError(
            f"{name} of shape {shape} is no stack of layers",
            where=str(directory),
            hint=f"its first dimension counts the layers, at most {MAX_LAYERS}, and no layer's "
            "parameter is empty",
        )
    for layer_idx in range(shape[0]):
        yield f"decoder.layers.{layer_idx}.{match['rest']}", layer_idx, shape[1:]


def check_stackable(
    parameters: Mapping[str, Parameter],
    dtypes: Mapping[str, Dtype],
    spec: ModelSpec,
    *,
    where: str,
) -> None:
    """A homogeneous model stores equal layers as one tensor, which has one dtype.

    Raises:
        DtypeMismatchError: BR303, naming the layers that differ from the first.
    """
    if spec.heterogeneous_block_specs:
        return
    wrong = []
    for name in parameters:
        match = _PER_LAYER.fullmatch(name)
        if match is not None:
            first = dtypes[f"decoder.layers.0.{match['rest']}"]
            if dtypes[name] != first:
                wrong.append(f"{name} is {dtypes[name].name}, that of layer 0 {first.name}")
    if wrong:
        raise DtypeMismatchError(
            f"layers of {where} differ in dtype, and Megatron stacks them into one tensor",
            where=wrong,
            hint="store a parameter in one dtype over all layers; nothing is rounded silently",
        )


def layout_megatron(
    parameters: Mapping[str, Parameter],
    dtypes: Mapping[str, Dtype],
    layout: ParallelLayout,
    *,
    spec: ModelSpec,
    args: Mapping[str, Any],
    iteration: int = 0,
) -> CheckpointLayout:
    """Lay out a checkpoint as the ranks of `layout` would have written it.

    Args:
        parameters: The model's parameters, whole.
        dtypes: Of each parameter.
        layout: One `__{rank}_{n}.distcp` group per rank, its chunks the rank's shards.
        spec: The model; a homogeneous one is stacked.
        args: For `common.pt`.
        iteration: Number in the tracker and the directory's name.

    Returns:
        Files relative to the checkpoint's root, tracker included. Payloads name parameters per
        layer, stacked or not.
    """
    num_layers = None if spec.heterogeneous_block_specs else spec.num_layers
    stage_of = {layer_idx: stage.pp_rank for stage in layout.stages() for layer_idx in stage.layers}
    stages = list(layout.stages())
    tp = layout.tensor_model_parallel_size
    chunks: list[Chunk] = []
    objects: dict[str, bytes] = {extra_state_key(_FINAL_NORM): empty_extra_state()}
    for parameter in parameters.values():
        if parameter.layer_idx is not None:
            pp_rank = stage_of[parameter.layer_idx]
        else:
            first = parameter.name.startswith("embedding.")
            pp_rank = stages[0 if first else -1].pp_rank
        for tp_rank in range(tp if parameter.tp_axis is not None else 1):
            chunks.extend(
                _chunk(parameter, box, dtypes[parameter.name], num_layers, pp_rank * tp + tp_rank)
                for box in parameter.shard_boxes(tp_rank, tp)
            )
        if parameter.layer_idx is not None and parameter.name.endswith(_LINEAR_SUFFIXES):
            objects[_object_key(parameter, num_layers)] = empty_extra_state()
    found = layout_checkpoint(chunks, objects, args=args, iteration=iteration)
    return replace(found, files=tuple(_per_layer_payloads(file) for file in found.files))


def _per_layer_payloads(file: FileLayout) -> FileLayout:
    """Name a stacked tensor's chunks by layer, as the tilings do."""
    return replace(file, payloads=tuple(map(_per_layer_payload, file.payloads)))


def _per_layer_payload(payload: Payload) -> Payload:
    match = _STACKED.fullmatch(payload.tensor)
    if match is None:
        return payload
    box = payload.box
    return replace(
        payload,
        tensor=f"decoder.layers.{box.starts[0]}.{match['rest']}",
        box=Box(box.starts[1:], box.stops[1:]),
    )


def _object_key(parameter: Parameter, num_layers: int | None) -> str:
    module = parameter.name.removesuffix(".weight")
    match = _PER_LAYER.fullmatch(module)
    if match is None or num_layers is None:
        return extra_state_key(module)
    layer_idx = int(match["layer"])
    return extra_state_key(
        f"decoder.layers.{match['rest']}", shard=layer_idx, num_shards=num_layers
    )


def _chunk(
    parameter: Parameter, box: Box, dtype: Dtype, num_layers: int | None, rank: int
) -> Chunk:
    key, shape = parameter.name, parameter.shape
    match = _PER_LAYER.fullmatch(key)
    if match is not None and num_layers is not None:
        layer_idx = int(match["layer"])
        key, shape = f"decoder.layers.{match['rest']}", (num_layers, *shape)
        box = Box((layer_idx, *box.starts), (layer_idx + 1, *box.stops))
    return Chunk(key=key, global_shape=shape, dtype=dtype, box=box, file_group=str(rank))
