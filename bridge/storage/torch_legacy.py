"""Reading Megatron-LM's `torch` checkpoints: one pickled state dict per TP and PP rank.

    iter_0000010/mp_rank_01/model_optim_rng.pt         TP rank 1, no pipeline parallelism
    iter_0000010/mp_rank_01_002/model_optim_rng.pt     TP rank 1 of pipeline rank 2

A file holds the rank's `model`, or `model0`, `model1`, ... of its virtual stages, and layers count
from 0 in each of them. Here they become whole tensors of whole models, like those of `torch_dist`:
shards are joined as the parameter table says TP cuts them, layers count on in the model's order.
The files are parsed, never run, and of their tensors only what is asked for is read.
Source: Megatron-LM core_v0.16.1 `get_checkpoint_name` and `generate_state_dict`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from bridge.dtypes import Words
from bridge.errors import CheckpointError, CorruptFileError
from bridge.parameters import (
    ATTENTION_ROWS,
    EMBEDDING_ROW,
    FFN_ROWS,
    OUTPUT_ROW,
    Order,
    Row,
)
from bridge.storage.chunks import ChunkReader
from bridge.storage.extents import Extent
from bridge.storage.pickle_objects import StoredTensor
from bridge.storage.remote import Location
from bridge.storage.remote_ranges import each_file
from bridge.storage.source import TensorInfo
from bridge.storage.torch_dist_metadata import RecordRange, StoredChunk, StoredKey
from bridge.storage.torch_legacy_ranks import (
    RankName,
    args_of,
    rank_directories,
    refuse_missing_ranks,
    refuse_old,
    refuse_unlike_ranks,
)
from bridge.storage.torch_legacy_stages import (
    LAYER,
    PART,
    first_layers,
    in_whole_model,
    num_layers_of,
    parts_of,
)
from bridge.storage.torch_record import Archive, TensorLocation
from bridge.storage.unpickle import unpickle_object
from bridge.tiling import Box, Shape

STATE_NAME: Final = "model_optim_rng.pt"
OPTIMIZER_NAME: Final = "distrib_optim.pt"

_ROWS: Final[Mapping[str, Row]] = {
    row.name: row
    for rows in (*ATTENTION_ROWS.values(), *FFN_ROWS.values(), (EMBEDDING_ROW, OUTPUT_ROW))
    for row in rows
}
_NORMS: Final = ("layernorm.weight", "layer_norm_weight")
_BAND: Final = 4 << 20  # bytes compared at once


@dataclass(frozen=True, slots=True)
class _Shard:
    """One rank's part of a tensor: where it lies, relative to the checkpoint."""

    rank: RankName
    file: str
    location: TensorLocation

    def chunk(self, box: Box, start: int) -> StoredChunk:
        """As a box of the whole tensor, from `start` bytes after its first element on."""
        nbytes = box.volume * self.location.dtype.itemsize
        return StoredChunk(box, RecordRange(self.file, self.location.offset + start, nbytes))


class TorchLegacyReader:
    """A `bridge.storage.source.TensorSource` over the ranks' files of one iteration.

    Args:
        directory: The one that holds the `mp_rank_*` directories.

    Raises:
        CheckpointError: BR300, ranks are missing, or a version or a kind of model too old to read.
        CorruptFileError: BR302, files that cannot be read, or that contradict each other.
    """

    def __init__(self, directory: Location) -> None:
        self.directory = directory
        ranks = rank_directories(directory)
        refuse_missing_ranks(ranks, directory)
        self._reader = ChunkReader(directory, _locate)
        try:
            self._read_states(ranks)
        except BaseException:
            self.close()
            raise

    def _read_states(self, ranks: Mapping[RankName, str]) -> None:
        """What the ranks' files hold, as tensors of the whole model."""
        directory = self.directory
        files = {rank: f"{name}/{STATE_NAME}" for rank, name in ranks.items()}
        archives = each_file(directory, self._archive, list(files.values()))
        states = {rank: archives[file] for rank, file in files.items()}
        self._common = states[0, 0][1]
        self._args = args_of(self._common, where=states[0, 0][0].where) or {}
        refuse_missing_ranks(ranks, directory, self._args)
        refuse_old(self._common.get("checkpoint_version", 0), where=str(directory))
        refuse_unlike_ranks({states[rank][0].where: states[rank][1] for rank in sorted(states)})
        shards = _shards(states, files, self._num_layers(), str(directory))
        self._drop_tied_copy(shards)
        self._stored = {
            name: self._joined(name, of_name, tp=1 + max(tp for tp, _ in ranks))
            for name, of_name in shards.items()
        }
        self.ignored_nbytes = self._ignored_nbytes(ranks)

    def _archive(self, file: str) -> tuple[Archive, dict[Any, Any]]:
        path = self.directory / file
        if not path.is_file():
            raise CheckpointError(f"the rank has no {STATE_NAME}", where=str(path))
        archive = Archive(self._reader.bytes_of(file), 0, path.stat().st_size, str(path))
        state = unpickle_object(archive.pickle(), where=str(path))
        if not isinstance(state, dict):
            raise CorruptFileError(f"holds {type(state).__name__}, not a dict", where=str(path))
        return archive, state

    def _num_layers(self) -> int | None:
        found = self._args.get("num_layers")
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    def _drop_tied_copy(self, shards: dict[str, list[_Shard]]) -> None:
        """The last pipeline rank's copy of a tied embedding is no tensor of its own."""
        if self._args.get("untie_embeddings_and_output_weights") is not False:
            return
        embedding = {one.rank[0]: one for one in shards.get(EMBEDDING_ROW.name, [])}
        for copy in shards.pop(OUTPUT_ROW.name, []):
            self._refuse_unequal(EMBEDDING_ROW.name, embedding.get(copy.rank[0], copy), copy)

    def _joined(self, name: str, shards: list[_Shard], *, tp: int) -> StoredKey:
        """One tensor of the shards that the ranks of one stage hold."""
        shards = sorted(shards, key=lambda one: one.rank)
        by_rank = {one.rank[0]: one for one in shards}
        first = shards[0].location
        whole = StoredKey(_info(first, first.shape), (shards[0].chunk(Box.whole(first.shape), 0),))
        layer = LAYER.fullmatch(name)
        row = _ROWS.get(name if layer is None else layer["rest"])
        if row is None and not name.endswith(_NORMS):
            return whole  # none of the family's: how TP cuts it is unknown, the accounting names it
        unlike = [
            f"{one.file}: {one.location.dtype.name} {one.location.shape}"
            for one in shards
            if (one.location.dtype, one.location.shape) != (first.dtype, first.shape)
        ]
        if unlike or len(by_rank) != len(shards) or len(by_rank) != tp:
            raise CorruptFileError(
                f"the {tp} TP ranks do not hold one shard each, all alike, of {name}",
                where=unlike or [one.file for one in shards],
                hint="the ranks' files must be of one iteration of one run",
            )
        if row is None or row.tp_axis is None:
            for one in shards[1:]:
                self._refuse_unequal(name, shards[0], one)
            return whole
        if len(first.shape) <= row.tp_axis:
            raise CorruptFileError(f"{name} has shape {first.shape}", where=shards[0].file)
        return _cut_over_tp(shards, row)

    def _refuse_unequal(self, name: str, one: _Shard, other: _Shard) -> None:
        """What several ranks hold must be the same on all of them."""
        same = _info(one.location, one.location.shape) == _info(
            other.location, other.location.shape
        )
        nbytes = _info(one.location, one.location.shape).nbytes
        for start in range(0, nbytes if same else 0, _BAND):
            size = min(_BAND, nbytes - start)
            left, right = (
                self._reader.bytes_of(each.file)(each.location.offset + start, size)
                for each in (one, other)
            )
            same = same and left == right
        if not same:
            raise CorruptFileError(
                f"ranks hold different copies of {name}",
                where=[str(self.directory / each.file) for each in (one, other)],
                hint="the ranks' files must be of one iteration of one run",
            )

    def _ignored_nbytes(self, ranks: Mapping[RankName, str]) -> dict[str, int]:
        """What else the files hold, by its name at the top; of the size only files tell."""
        kept = {"args", "checkpoint_version", "iteration"}
        found = {name: 0 for name in self._common if name not in kept and not PART.fullmatch(name)}
        for name in ranks.values():
            path = self.directory / name / OPTIMIZER_NAME
            if path.is_file():
                found[OPTIMIZER_NAME] = found.get(OPTIMIZER_NAME, 0) + path.stat().st_size
        return found

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Global shape and dtype of every tensor of the model, by key."""
        return {name: stored.info for name, stored in self._stored.items()}

    def common(self) -> Mapping[str, object]:
        """What the first rank's file holds beside the model: `args`, `iteration` and others."""
        return {name: value for name, value in self._common.items() if not PART.fullmatch(name)}

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Fill `out` with that box of the tensor; see `ChunkReader.read_into`."""
        self._reader.read_into(name, self._stored[name], box, out)

    def extents(self, name: str, box: Box) -> list[Extent] | None:
        """Where the box lies, run by run; see `bridge.storage.extents.FileSource`."""
        return self._reader.extents(name, self._stored[name], box)

    def close(self) -> None:
        """Close every file."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _locate(_: str, stored: StoredKey, chunk: StoredChunk) -> TensorLocation:
    """A chunk's record is its elements and nothing else."""
    return TensorLocation(
        dtype=stored.info.dtype, shape=chunk.box.shape, offset=chunk.record.offset
    )


def _info(location: TensorLocation, shape: Shape) -> TensorInfo:
    return TensorInfo(shape=shape, dtype=location.dtype)


def _cut_over_tp(shards: list[_Shard], row: Row) -> StoredKey:
    """Join what TP cut: each source of a stacked row on its own, anything else as a whole."""
    axis = row.tp_axis or 0
    first = shards[0].location
    segments = len(row.sources) if row.order is Order.STACKED else 1
    extent, rest = divmod(first.shape[axis], segments)
    if rest:
        raise CorruptFileError(f"{row.name} of {first.shape[axis]} rows", where=shards[0].file)
    shape = list(first.shape)
    shape[axis] *= len(shards)
    chunks = []
    for segment in range(segments):
        for index, shard in enumerate(shards):
            starts, stops = [0] * len(shape), list(first.shape)
            starts[axis] = (segment * len(shards) + index) * extent
            stops[axis] = starts[axis] + extent
            box = Box(tuple(starts), tuple(stops))
            # Only rows are ever cut into segments, so each is one run of the shard's elements.
            chunks.append(shard.chunk(box, segment * box.volume * first.dtype.itemsize))
    return StoredKey(_info(first, tuple(shape)), tuple(sorted(chunks, key=_starts)))


def _starts(chunk: StoredChunk) -> Shape:
    return chunk.box.starts


def _shards(
    states: Mapping[RankName, tuple[Archive, Mapping[Any, Any]]],
    files: Mapping[RankName, str],
    num_layers: int | None,
    where: str,
) -> dict[str, list[_Shard]]:
    """Every parameter of the model by its name in the whole model, with the ranks' shards."""
    parts: dict[tuple[int, int], list[tuple[RankName, Mapping[str, object]]]] = defaultdict(list)
    for rank, (archive, state) in states.items():
        for vp_stage, part in parts_of(state, archive.where):
            parts[vp_stage, rank[1]].append((rank, part))
    # Virtual stage `vp_stage * PP + pp_rank`: Megatron deals layers out in that order.
    counts = {
        stage: max((num_layers_of(part) for _, part in of_stage), default=0)
        for stage, of_stage in sorted(parts.items())
    }
    offsets = first_layers(counts, num_layers, where)
    found: dict[str, list[_Shard]] = defaultdict(list)
    for stage, of_stage in sorted(parts.items()):
        for rank, part in of_stage:
            archive = states[rank][0]
            for key, value in part.items():
                if not isinstance(value, StoredTensor) or key.endswith("._extra_state"):
                    continue
                name = in_whole_model(key, offsets[stage])
                found[name].append(_Shard(rank, files[rank], archive.locate(value)))
    return found
