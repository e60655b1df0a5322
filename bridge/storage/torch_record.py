r"""One `torch.save` archive, byte by byte: written around a payload, read without one.

A record is a zip archive of stored (never compressed) entries:

    archive/data.pkl    a pickle that describes the object; storages are persistent ids
    archive/byteorder   "little"
    archive/version     "3\n", the version of this layout
    archive/data/KEY    the raw elements of storage KEY, aligned to 64 bytes

Ours puts the payload last, so that everything but two CRC-32s is known before the payload is, and
always uses ZIP64 for it, so that a record of 1 kB has the same structure as one of 100 GB.
Sources: APPNOTE.TXT 6.3.10 of the zip format; PyTorch 2.13 caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from bridge.dtypes import Dtype
from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage.pickle_names import STORAGE_DTYPES
from bridge.storage.pickle_objects import StoredTensor
from bridge.storage.pickle_write import Call, Global, PersistentId, dumps
from bridge.storage.unpickle import unpickle_object, unpickle_tensor
from bridge.tiling import Shape

ALIGNMENT: Final = 64
"""Of a payload, in bytes from the start of its record, as torch aligns."""

_LOCAL: Final = struct.Struct("<4s5H3I2H")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_END: Final = struct.Struct("<4s4H2IH")
_END64: Final = struct.Struct("<4sQ2H2I4Q")
_LOCATOR: Final = struct.Struct("<4sIQI")
_ZIP64_EXTRA: Final = struct.Struct("<2H2Q")  # id 1, 16 bytes: size, compressed size
_CRC_IN_LOCAL: Final = 14
_CRC_IN_CENTRAL: Final = 16
_VERSION, _VERSION64 = 20, 45
_DATE: Final = 0x21  # 1980-01-01, the zero of zip time: no clock in the output
_FULL32: Final = 0xFFFFFFFF
_PADDING_ID: Final = 0x4246  # "FB", torch's own id of its alignment padding

_MAX_DIRECTORY: Final = 1 << 24  # bytes; a record of torch's needs less than 1 kB
_MAX_PICKLE: Final = 1 << 26  # bytes
_BYTEORDER: Final = b"little"
_BEFORE_ZIP: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled number with which files of `torch.save` begin that are no zip archives."""
_STORAGE_NAMES: Final = {name: storage for storage, name in STORAGE_DTYPES.items()}

Reader = Callable[[int, int], bytes]
"""(offset, length) of a file to exactly that many bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """The bytes around a payload of `nbytes`; positions count from the record's first byte."""

    prefix: bytes
    nbytes: int
    suffix: bytes
    crc32_at: tuple[int, int]
    """Where the payload's CRC-32 goes, as four little-endian bytes."""

    @property
    def size(self) -> int:
        """Length of the whole record in bytes."""
        return len(self.prefix) + self.nbytes + len(self.suffix)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLocation:
    """Where the elements of a contiguous tensor lie in a file: row-major, from `offset` on."""

    dtype: Dtype
    shape: Shape
    offset: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of a zip directory."""

    header: int
    size: int
    crc32: int


def _zip64_fields(extra: bytes) -> Iterator[int]:
    """The 8-byte values of a ZIP64 extra field, in order; none when there is no such field."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            yield from struct.unpack(f"<{size // 8}Q", extra[4 : 4 + size // 8 * 8])
            return
        extra = extra[4 + size :]


def _entry(name: str, crc32: int, size: int, position: int) -> tuple[bytes, bytes]:
    """A stored entry of known bytes: its local header, its central header."""
    path = name.encode()
    common = (_VERSION, 0, 0, 0, _DATE, crc32, size, size, len(path), 0)
    return (
        _LOCAL.pack(b"PK\3\4", *common) + path,
        _CENTRAL.pack(b"PK\1\2", _VERSION, *common, 0, 0, 0, 0, position) + path,
    )


def _payload_entry(name: str, size: int, position: int) -> tuple[bytes, bytes]:
    """The same for an entry whose CRC-32 comes later, padded so that its data are aligned."""
    path = name.encode()
    zip64 = _ZIP64_EXTRA.pack(1, 16, size, size)
    begin = position + _LOCAL.size + len(path) + len(zip64) + 4
    padding = -begin % ALIGNMENT
    extra = zip64 + struct.pack("<2H", _PADDING_ID, padding) + b"Z" * padding
    common = (_VERSION64, 0, 0, 0, _DATE, 0, _FULL32, _FULL32, len(path))
    return (
        _LOCAL.pack(b"PK\3\4", *common, len(extra)) + path + extra,
        _CENTRAL.pack(b"PK\1\2", _VERSION64, *common, len(zip64), 0, 0, 0, 0, position)
        + path
        + zip64,
    )


def _archive(pickle: bytes, nbytes: int | None, archive: str) -> RecordLayout:
    """Lay out an archive of one pickle and, if `nbytes` is given, of one storage, "0"."""
    prefix, directory = bytearray(), bytearray()
    entries = {"data.pkl": pickle, "byteorder": _BYTEORDER, "version": b"3\n"}
    for name, data in entries.items():
        local, central = _entry(f"{archive}/{name}", zlib.crc32(data), len(data), len(prefix))
        prefix += local + data
        directory += central
    crc32_at = (0, 0)
    if nbytes is not None:
        local, central = _payload_entry(f"{archive}/data/0", nbytes, len(prefix))
        after = len(prefix) + len(local) + nbytes + len(directory)
        crc32_at = (len(prefix) + _CRC_IN_LOCAL, after + _CRC_IN_CENTRAL)
        prefix += local
        directory += central
    count, start = len(entries) + (nbytes is not None), len(prefix) + (nbytes or 0)
    end64 = _END64.pack(
        b"PK\6\6",
        _END64.size - 12,
        *(_VERSION64, _VERSION64),
        *(0, 0, count, count, len(directory), start),
    )
    locator = _LOCATOR.pack(b"PK\6\7", 0, start + len(directory), 1)
    end = _END.pack(b"PK\5\6", 0, 0, count, count, len(directory), min(start, _FULL32), 0)
    return RecordLayout(
        prefix=bytes(prefix),
        nbytes=nbytes or 0,
        suffix=bytes(directory) + end64 + locator + end,
        crc32_at=crc32_at,
    )


def _rebuild(dtype: Dtype, shape: Shape) -> Call:
    """Describe a contiguous CPU tensor that owns the whole of storage "0"."""
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    numel = math.prod(shape)
    legacy = _STORAGE_NAMES.get(dtype.name)
    storage = (
        (Global("torch", legacy), "0", "cpu", numel)
        if legacy
        else (Global("torch.storage", "UntypedStorage"), "0", "cpu", numel * dtype.itemsize)
    )
    hooks = Call(Global("collections", "OrderedDict"), ())
    args = (PersistentId(("storage", *storage)), 0, shape, stride, False, hooks)
    if legacy:
        return Call(Global("torch._utils", "_rebuild_tensor_v2"), args)
    return Call(Global("torch._utils", "_rebuild_tensor_v3"), (*args, dtype))


def record_layout(dtype: Dtype, shape: Shape, *, archive: str = "archive") -> RecordLayout:
    """Lay out what `torch.save` of a contiguous tensor would write, but for its elements.

    Args:
        dtype: Of the elements, little-endian.
        shape: Of the tensor; the payload is row-major.
        archive: Name of the archive's top directory; torch takes the file's stem.

    Returns:
        The same bytes for the same arguments. The payload begins at a multiple of `ALIGNMENT`
        from the start of the record. Both CRC-32s are left as zeros: right for an empty payload.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    return _archive(dumps(_rebuild(dtype, shape)), nbytes, archive)


def empty_tensors_record(dtype: Dtype, *, archive: str = "archive") -> bytes:
    """What `torch.save([torch.empty(0, dtype=dtype)])` holds: a list of one empty tensor."""
    layout = _archive(dumps([_rebuild(dtype, (0,))]), 0, archive)
    return layout.prefix + layout.suffix


def object_record(value: object, *, archive: str = "archive") -> bytes:
    """What `torch.save` of plain data without tensors holds; see `pickle_write.dumps`.

    Raises:
        PlanError: BR400, something that is not plain data.
    """
    layout = _archive(dumps(value), None, archive)
    return layout.prefix + layout.suffix


def zeros_record(dtypes: Mapping[str, Dtype], *, archive: str = "archive") -> bytes:
    """What `torch.save` of a dictionary of zeros holds, each a tensor without dimensions.

    They share one storage of zeros, so whoever loads them reads them and does not write to them.
    """
    nbytes = max(dtype.itemsize for dtype in dtypes.values())
    storage = PersistentId(
        ("storage", Global("torch.storage", "UntypedStorage"), "0", "cpu", nbytes)
    )
    hooks = Call(Global("collections", "OrderedDict"), ())
    value = {
        name: Call(
            Global("torch._utils", "_rebuild_tensor_v3"), (storage, 0, (), (), False, hooks, dtype)
        )
        for name, dtype in dtypes.items()
    }
    layout = _archive(dumps(value), nbytes, archive)
    record = bytearray(layout.prefix + bytes(nbytes) + layout.suffix)
    for position in layout.crc32_at:
        record[position : position + 4] = zlib.crc32(bytes(nbytes)).to_bytes(4, "little")
    return bytes(record)


class Archive:
    """The directory of an archive that lies at (offset, length) of a file."""

    def __init__(self, read: Reader, offset: int, length: int, where: str) -> None:
        self._read, self._offset, self._length, self.where = read, offset, length, where
        self.entries = self._directory()
        pickles = [name for name in self.entries if name.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].count("/") != 1:
            raise self._corrupt(
                f"has {len(pickles)} data.pkl, not one: torch.save did not write it"
            )
        self.root = pickles[0].removesuffix("data.pkl")
        order = self.entries.get(f"{self.root}byteorder")
        if order and (order.size, order.crc32) != (len(_BYTEORDER), zlib.crc32(_BYTEORDER)):
            raise self._corrupt("was not written by a little-endian machine")

    def _corrupt(self, what: str) -> CorruptFileError:
        return CorruptFileError(
            f"the record at bytes {self._offset} to {self._offset + self._length} {what}",
            where=self.where,
            hint="the file is truncated or damaged: copy or download it again",
        )

    def _bytes(self, start: int, size: int) -> bytes:
        if start < 0 or size < 0 or start + size > self._length:
            raise self._corrupt(f"points outside itself: {size} bytes at {start}")
        return self._read(self._offset + start, size)

    def _directory(self) -> dict[str, _Entry]:
        tail_size = min(self._length, 4096)
        tail = self._bytes(self._length - tail_size, tail_size)
        if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\5\6" or tail[-2:] != b"\0\0":
            if self._length and self._bytes(0, min(self._length, 15)) == _BEFORE_ZIP:
                raise CheckpointError(
                    "the file is of the format that torch.save wrote before PyTorch 1.6",
                    where=self.where,
                    hint="save it again: torch.save(torch.load(F, weights_only=False), F), which "
                    "runs what it holds, so do that only where you trust its source",
                )
            raise self._corrupt("does not end as a zip archive does")
        _, _, _, _, count, size, start, _ = _END.unpack(tail[-_END.size :])
        locator = tail[-_END.size - _LOCATOR.size : -_END.size]
        if locator[:4] == b"PK\6\7":
            end64 = self._bytes(_LOCATOR.unpack(locator)[2], _END64.size)
            if end64[:4] != b"PK\6\6":
                raise self._corrupt("has no ZIP64 end record where it says")
            count, size, start = _END64.unpack(end64)[7:]
        if size > _MAX_DIRECTORY:
            raise self._corrupt(f"claims a directory of {size} bytes")
        at = start - (self._length - tail_size)
        data = tail[at : at + size] if 0 <= at <= tail_size - size else self._bytes(start, size)
        return self._parse(data, count)

    def _parse(self, data: bytes, count: int) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        position = 0
        for _ in range(count):
            if data[position : position + 4] != b"PK\1\2" or len(data) < position + _CENTRAL.size:
                raise self._corrupt("has a broken directory")
            fields = _CENTRAL.unpack_from(data, position)
            flags, method, crc32, packed, size = fields[3], fields[4], *fields[7:10]
            names, extras, comment, header = *fields[10:13], fields[16]
            position += _CENTRAL.size
            name = data[position : position + names].decode("utf-8", "replace")
            extra = data[position + names : position + names + extras]
            position += names + extras + comment
            wide = _zip64_fields(extra)
            try:
                size = next(wide) if size == _FULL32 else size
                packed = next(wide) if packed == _FULL32 else packed
                header = next(wide) if header == _FULL32 else header
            except (StopIteration, struct.error):
                raise self._corrupt(f"gives {name!r} no ZIP64 sizes") from None
            if method or flags & 1 or packed != size or name in entries:
                raise self._corrupt(f"has {name!r} compressed, encrypted or twice")
            entries[name] = _Entry(header, size, crc32)
        return entries

    def data_offset(self, name: str) -> int:
        """Where an entry's data begin, from the record's start; they end inside the record."""
        entry = self.entries.get(name)
        if entry is None:
            raise self._corrupt(f"has no {name!r}")
        local = self._bytes(entry.header, _LOCAL.size)
        if local[:4] != b"PK\3\4":
            raise self._corrupt(f"has no {name!r} where its directory says")
        names, extras = struct.unpack_from("<2H", local, _LOCAL.size - 4)
        begin: int = entry.header + _LOCAL.size + names + extras
        if begin + entry.size > self._length:
            raise self._corrupt(f"is too short for {name!r}")
        return begin

    def pickle(self) -> bytes:
        """The archive's pickle, its CRC-32 checked."""
        name = f"{self.root}data.pkl"
        entry = self.entries[name]
        if entry.size > _MAX_PICKLE:
            raise self._corrupt(f"claims a pickle of {entry.size} bytes")
        data = self._bytes(self.data_offset(name), entry.size)
        if zlib.crc32(data) != entry.crc32:
            raise self._corrupt("has a damaged pickle: its CRC-32 does not match")
        return data

    def locate(self, tensor: StoredTensor) -> TensorLocation:
        """Find a tensor's first element and check that its last is there too."""
        name = f"{self.root}data/{tensor.storage}"
        begin = self.data_offset(name)
        numel = math.prod(tensor.shape)
        expected = 1
        for extent, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
            if numel and extent != 1 and stride != expected:
                raise CorruptFileError(
                    f"the tensor of shape {tensor.shape} is stored with strides {tensor.stride}, "
                    "not row by row",
                    where=self.where,
                    hint="save it again after .contiguous(), as Megatron-Core does",
                )
            expected *= extent
        first = tensor.storage_offset * tensor.dtype.itemsize
        size = self.entries[name].size
        if size != tensor.storage_nbytes or first + numel * tensor.dtype.itemsize > size:
            raise self._corrupt(
                f"has {size} bytes in {name!r}: not {tensor.storage_nbytes}, or too few for "
                f"{tensor.shape} {tensor.dtype.name} from element {tensor.storage_offset} on"
            )
        return TensorLocation(
            dtype=tensor.dtype, shape=tensor.shape, offset=self._offset + begin + first
        )


def locate_tensor(read: Reader, offset: int, length: int, *, where: str) -> TensorLocation:
    """Find the elements of the tensor that a record in a file holds, without reading them.

    Args:
        read: Gives bytes of the file.
        offset: Of the record in the file.
        length: Of the record, in bytes.
        where: File and key, for error reports.

    Returns:
        Dtype, shape and absolute offset of the first element. The storage may be bigger than the
        tensor, as that of a slice is.

    Raises:
        CorruptFileError: BR302, not a record of one contiguous little-endian tensor, or one whose
            parts do not lie inside it.
        DtypeMismatchError: BR303, a dtype the bridge does not know.
    """
    archive = Archive(read, offset, length, where)
    return archive.locate(unpickle_tensor(archive.pickle(), where=where))


def read_object(read: Reader, offset: int, length: int, *, where: str) -> object:
    """Read the object of a record, running nothing: see `unpickle.unpickle_object`.

    Raises:
        CorruptFileError: BR302, not a record, or a pickle that asks for more than data.
    """
    return unpickle_object(Archive(read, offset, length, where).pickle(), where=where)
