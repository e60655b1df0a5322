"""Configurations, headers and YAML of strangers: one meaning, bounded cost, a code for the rest."""

from __future__ import annotations

import json
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from bridge.errors import BridgeError, CheckpointError, ConfigError, CorruptFileError
from bridge.hf_config import load_hf_config, spec_from_hf_config
from bridge.storage.safetensors import SafetensorsSource, read_header
from bridge.strict_json import parse_json
from bridge.strict_yaml import parse_yaml
from harness.toys import toy_named

LLAMA: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
SIZES: Final = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
    "intermediate_size", "vocab_size",
)  # fmt: skip


def spec_of(directory: Path, text: str | bytes) -> object:
    """Read a configuration as every command does."""
    path = directory / "config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return spec_from_hf_config(load_hf_config(path))


def bounded(function: Callable[[], object], *, seconds: float = 20, gib: float = 1) -> BridgeError:
    """The error with which something is refused, in no more than so much time and memory."""
    before, started = _peak(), time.monotonic()
    with pytest.raises(BridgeError) as caught:
        function()
    assert time.monotonic() - started < seconds
    assert (_peak() - before) / (1 << 30) < gib
    return caught.value


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_the_configuration_that_is_made_hostile_is_a_good_one(tmp_path: Path) -> None:
    """Otherwise everything below would be refused for another reason."""
    spec_of(tmp_path, json.dumps(LLAMA))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "value", [10**9, 2**39, 2**70, -1, 0, True, "64", 64.0, None, [], {"a": 1}], ids=repr
)
def test_a_size_that_is_none_is_refused(tmp_path: Path, name: str, value: object) -> None:
    """Of 10^9 layers as of a float that is whole: the field is named, nothing is built."""
    if value is None and name == "num_key_value_heads":
        pytest.skip("absent means as many as there are heads")
    error = bounded(lambda: spec_of(tmp_path, json.dumps(LLAMA | {name: value})))
    assert isinstance(error, ConfigError)
    assert error.where


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "true", '"1"', "0", "-1",
               "1" + "0" * 400, "9" * 5000],
)  # fmt: skip
def test_a_number_that_is_none_is_refused(tmp_path: Path, name: str, number: str) -> None:
    """What Python reads as infinity or not at all, other readers read as they please."""
    text = json.dumps(LLAMA | {name: "@"}).replace('"@"', number)
    assert isinstance(bounded(lambda: spec_of(tmp_path, text)), ConfigError)


def decilm(**fields: object) -> str:
    """A DeciLM configuration with other fields; `blocks` many copies of its first block."""
    config = dict(toy_named("super-49b-v1").config)
    count = fields.pop("blocks", None)
    if isinstance(count, int):
        config["block_configs"] = config["block_configs"][:1] * count
    return json.dumps(config | fields)


@pytest.mark.parametrize(
    "text",
    [
        decilm(num_hidden_layers=10**9),
        decilm(num_hidden_layers=10**9, block_configs=None),
        decilm(num_hidden_layers=100_000, blocks=100_000),
        decilm(num_hidden_layers=1_000_000, block_configs=[1] * 1_000_000),
        decilm(num_hidden_layers=3000, blocks=3000),
        json.dumps(LLAMA | {"num_hidden_layers": 2000, "num_attention_heads": 2**20,
                            "num_key_value_heads": 2**20, "hidden_size": 2**21}),
        json.dumps(LLAMA | {"hidden_act": "x" * 5_000_000}),
        json.dumps(LLAMA | {"max_position_embeddings": 2**33}),
        json.dumps(LLAMA | {"rope_theta": 1e308}),
        json.dumps(LLAMA | {f"unknown{n}": n for n in range(200_000)}),
        '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a":' + "[" * 900 + "]" * 900 + "}",
        '{"hidden_size": 1, "hidden_size": 2}',
        '{"rope_scaling": {"factor": 1, "factor": 2}}',
        '{"\\ud800": 1}',
        b"\xef\xbb\xbf" + json.dumps(LLAMA).encode(),
        json.dumps(LLAMA).encode("utf-16"),
        b'{"a": "\xff"}',
        b"", b"\0" * 100, b"[]", b"null",
    ],
    ids=lambda _: "",
)  # fmt: skip
def test_a_configuration_that_means_two_things_or_too_much_is_refused(
    tmp_path: Path, text: str | bytes
) -> None:
    """Layers without end, nesting, repeated keys, other encodings: BR1xx, printable."""
    error = bounded(lambda: spec_of(tmp_path, text))
    assert isinstance(error, ConfigError)
    assert len(str(error)) < 120_000


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """Nothing of a sparse file of 3 GiB is read where a configuration or an index should be."""
    for name in ("config.json", "model.safetensors.index.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(3 << 30)
    assert bounded(lambda: load_hf_config(tmp_path), gib=0.1).code == "BR302"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert bounded(lambda: SafetensorsSource(tmp_path), gib=0.1).code == "BR302"


# Safetensors


def safetensors(header: str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of any header, which may lie about its length."""
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(**fields: object) -> str:
    """The header of one tensor of 4 bytes, with other fields."""
    good: dict[str, object] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return json.dumps({"a": good | fields})


@pytest.mark.parametrize(
    "data",
    [
        safetensors("{}", length=1 << 60),
        safetensors("{}", length=(1 << 64) - 1),
        safetensors("{}", length=3),
        safetensors(entry(), b"\0" * 3),
        safetensors(entry(), b"\0" * 5),
        safetensors(entry(data_offsets=[0, 1 << 62]), b"\0" * 4),
        safetensors(entry(data_offsets=[-4, 0]), b"\0" * 4),
        safetensors(entry(data_offsets=[4, 0]), b"\0" * 4),
        safetensors(entry(data_offsets=[0.0, 4.0]), b"\0" * 4),
        safetensors(entry(data_offsets=["0", "4"]), b"\0" * 4),
        safetensors(entry(data_offsets=[False, 4]), b"\0" * 4),
        safetensors(entry(data_offsets=[0, 4, 8]), b"\0" * 4),
        safetensors(entry(shape=[1 << 62, 1 << 62]), b"\0" * 4),
        safetensors(entry(shape=[-1]), b"\0" * 4),
        safetensors(entry(shape=[True]), b"\0" * 4),
        safetensors(entry(shape=[1.0]), b"\0" * 4),
        safetensors(entry(shape="1"), b"\0" * 4),
        safetensors(entry(shape=""), b"\0" * 4), safetensors(entry(shape={}), b"\0" * 4),
        safetensors(entry(shape=[1] * 100_000), b"\0" * 4),
        safetensors(entry(dtype="F64"), b"\0" * 4),
        safetensors(entry(dtype="Q4"), b"\0" * 4),
        safetensors(entry(dtype=["F32"]), b"\0" * 4),
        safetensors('{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}', b"\0" * 4),
        safetensors('{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
                    b"\0" * 4),
        safetensors('{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, '
                    '"b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}', b"\0" * 3),
        safetensors('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, '
                    '"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}', b"\0" * 2),
        safetensors('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}', b"\0" * 2),
        safetensors('{"__metadata__": {"a": 1}}'),
        safetensors('{"__metadata__": "pt"}'),
        safetensors('{"\\udc80": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
        safetensors("[" * 100_000), safetensors("[]"), safetensors("null"), safetensors(b"\xff"),
        safetensors(b"\xef\xbb\xbf{}"), b"", b"\0" * 7,
    ],
    ids=lambda _: "",
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path: Path, data: bytes) -> None:
    """Offsets, shapes, dtypes, lengths, names that are not what they should be: BR302, BR303."""
    (tmp_path / "model.safetensors").write_bytes(data)
    error = bounded(lambda: read_header(tmp_path, "model.safetensors"), gib=0.2)
    assert error.code in {"BR302", "BR303"}
    str(error).encode()  # printable


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """The reference implementation's limit of 100 MB: a sparse file whose header has 3 GB."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 3_000_000_000))
        file.truncate(3_000_000_100)
    error = bounded(lambda: read_header(tmp_path, "model.safetensors"), gib=0.1)
    assert isinstance(error, CorruptFileError)
    assert "longer than" in error.message


def test_a_header_just_below_the_limit_is_bounded_in_memory(tmp_path: Path) -> None:
    """What costs Python most, brackets in brackets, 90 MB of them."""
    (tmp_path / "model.safetensors").write_bytes(safetensors(b"{" + b'"a":[[],[],[]],' * 6_000_000))
    error = bounded(lambda: read_header(tmp_path, "model.safetensors"), seconds=120, gib=4)
    assert isinstance(error, CheckpointError)


# JSON and YAML by themselves


@pytest.mark.parametrize("text", ['"\\ud800"', '{"a": 1, "a": 1}', "NaN", "1e999", "[" * 10_000])
def test_json_of_two_meanings_is_a_value_error(text: str) -> None:
    """Nothing else escapes, whatever is in there."""
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)


def test_json_keeps_what_is_good() -> None:
    """A whole pair of surrogates is one character; numbers keep their kind."""
    assert parse_json('{"a": ["\\ud83d\\ude00", 1, 1.0, -0.0, null]}') == {
        "a": ["\U0001f600", 1, 1.0, -0.0, None]
    }


def laughs(levels: int, *, merge: bool) -> bytes:
    """Each level is the one before ten times: 10^levels of them, in some lines."""
    lines = ["a0: &a0 {k: v}" if merge else "a0: &a0 lol"]
    for n in range(1, levels):
        names = ", ".join([f"*a{n - 1}"] * 10)
        lines.append(f"a{n}: &a{n} " + (f"{{<<: [{names}]}}" if merge else f"[{names}]"))
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    "text",
    [
        laughs(12, merge=False), laughs(12, merge=True),
        b"!!python/object/apply:os.system ['true']",
        b"!!python/name:os.system",
        b"[" * 5000, b"a: " * 5000, b"? [a]\n: b", b"a: &x [*x]\nb: *y", b"2001-99-99", b"\xff",
        b"a: 1\n" * 1_000_000, b"\0", b"!!binary 'a'", b"!!int 'x'", b"- - - " * 3000,
        b"a: 1\na: 2", b"{a: 1, b: {c: 1, c: 1}}", b"1" * 5000, b"? 0x" + b"f" * 5000 + b"\n: 1",
    ],
    ids=lambda _: "",
)  # fmt: skip
def test_yaml_that_laughs_or_runs_is_a_value_error(text: bytes) -> None:
    """Aliases are counted as what they stand for; tags of Python's objects are unknown."""
    started = time.monotonic()
    with pytest.raises(ValueError, match=r".+"):
        parse_yaml(text)
    assert time.monotonic() - started < 30


def test_yaml_of_a_run_may_repeat_itself_a_little() -> None:
    """Writers of YAML put an alias wherever two fields are one object."""
    assert parse_yaml(b"a: &x [1, 2]\nb: *x\nmodel: {hf_model_id: org/name}") == {
        "a": [1, 2], "b": [1, 2], "model": {"hf_model_id": "org/name"},
    }  # fmt: skip
