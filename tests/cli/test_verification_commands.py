"""The verifying commands as a user runs them: what is refused, with which code, what is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from bridge.convert import import_checkpoint
from bridge.dtypes import Words
from bridge.record import RECORD_NAME, SIDE_DIRECTORY
from bridge.storage.megatron import MegatronSource
from bridge.tiling import Box
from harness import toys
from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests.cli.conftest import Outcome, Run


# 523 vocabulary entries, padded to 640 rows; positions up to 131,072; heterogeneous blocks.
TOY = "super-49b-v1_5"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its conversion, which no test changes."""
    root = tmp_path_factory.mktemp("originals")
    write_checkpoint(toy_named(TOY), root / "hf")
    import_checkpoint(root / "hf", root / "megatron")
    return root


@pytest.fixture
def hf(originals: Path, tmp_path: Path) -> Path:
    """A Hugging Face checkpoint of one's own."""
    return Path(shutil.copytree(originals / "hf", tmp_path / "hf"))


@pytest.fixture
def megatron(originals: Path, tmp_path: Path) -> Path:
    """Its conversion."""
    return Path(shutil.copytree(originals / "megatron", tmp_path / "megatron"))


def change_args(megatron: Path, **changes: object) -> None:
    """Make the checkpoint say something else of its model."""
    (file,) = megatron.rglob("common.pt")
    common = torch.load(file, weights_only=False)
    args = common["args"]
    (args if isinstance(args, dict) else vars(args)).update(changes)
    torch.save(common, file)


def change_config(hf: Path, **changes: object) -> None:
    """Rewrite config.json with other values."""
    file = hf / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def tokens(directory: Path, **arrays: list[Any]) -> Path:
    """An input file for `logits`."""
    path = directory / "in.safetensors"
    save_file({name: np.array(values) for name, values in arrays.items()}, path)
    return path


def no_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a model is loaded, either side's."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("something was computed")

    monkeypatch.setattr("harness.logits_file.load_hf_model", refuse)
    monkeypatch.setattr("harness.logits_file.RankPool", refuse)


# --------------------------------------------------------------------------------------
# The model that a Megatron checkpoint is
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rotary_base": 10_000}, "BR104 the configuration is not that of the checkpoint"),
        ({"rotary_percent": 0.5}, "rotary_percent=0.5"),
        ({"norm_epsilon": 1e-6}, "layernorm_epsilon"),
    ],
)
def test_logits_refuses_a_megatron_checkpoint_that_says_it_is_another_model(
    run: Run, monkeypatch: pytest.MonkeyPatch, megatron: Path, tmp_path: Path,
    change: Mapping[str, object], said: str,
) -> None:  # fmt: skip
    """The configuration kept at import is not believed against the checkpoint's own args."""
    change_args(megatron, **change)
    no_computing(monkeypatch)
    found = run(
        "logits", "--megatron-path", megatron, "--input", tokens(tmp_path, input_ids=[[1, 2]]),
        "--output", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert found.code == 2
    assert said in found.err
    assert "Traceback" not in found.err


def test_logits_refuses_a_given_configuration_that_the_checkpoint_denies(
    run: Run, monkeypatch: pytest.MonkeyPatch, hf: Path, megatron: Path, tmp_path: Path
) -> None:
    """--hf-model with another epsilon than the args'."""
    shutil.rmtree(megatron / SIDE_DIRECTORY)
    change_config(hf, rms_norm_eps=1e-6)
    no_computing(monkeypatch)
    found = run(
        "logits", "--megatron-path", megatron, "--hf-model", hf,
        "--input", tokens(tmp_path, input_ids=[[1, 2]]), "--output", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert found.code == 2
    assert "BR104" in found.err
    assert "layernorm_epsilon: 1e-06" in found.err


def test_verify_says_which_value_of_the_model_differs_and_counts_it_as_no_element(
    run: Run, hf: Path, megatron: Path
) -> None:
    """A contradiction in the args is one value, and the elements are all equal."""
    change_args(megatron, rotary_base=10_000)
    found = run("verify", "--hf-model", hf, "--megatron-path", megatron, "--select", "round_trip")
    assert found.code == 1
    assert "  1 value of the model differs, 0 of 1,991,168 elements differ (limit 0): " in found.out
    assert "rotary_base=10000" in found.out


def test_verify_says_which_block_differs_without_printing_all_of_them(
    run: Run, hf: Path, megatron: Path
) -> None:
    """One line of a block in words, however many blocks a model has."""
    args = vars_of(megatron)
    blocks = json.loads(args["heterogeneous_layers_config_encoded_json"])
    wide = next(b for b in blocks["block_configs"] if b["ffn"]["ffn_hidden_size"])
    wide["ffn"]["ffn_hidden_size"] *= 2
    change_args(megatron, heterogeneous_layers_config_encoded_json=json.dumps(blocks))
    found = run("verify", "--hf-model", hf, "--megatron-path", megatron, "--select", "round_trip")
    assert found.code == 1
    assert "1 value of the model differs" in found.out
    assert "BlockSpec(" not in found.out
    assert f"SwiGLU {wide['ffn']['ffn_hidden_size']}" in found.out


def vars_of(megatron: Path) -> Mapping[str, Any]:
    """A checkpoint's args."""
    with MegatronSource(megatron) as source:
        assert source.args is not None
        return source.args


def test_verify_counts_a_differing_tensor_as_one_tensor_and_says_its_elements(
    run: Run, hf: Path, megatron: Path
) -> None:
    """Two elements of one tensor: neither "1 element" nor "2 tensors"."""
    (shard,) = [p for p in hf.glob("*.safetensors") if "model.norm.weight" in load_file(p)]
    tensors = load_file(shard)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].copy()
    tensors["model.norm.weight"][[3, 9]] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    found = run("verify", "--hf-model", hf, "--megatron-path", megatron, "--select", "round_trip")
    assert found.code == 1
    assert "  1 tensor differs, 2 of 1,991,168 elements differ (limit 0): " in found.out
    assert "model.norm.weight[3]: 2 elements differ, this one first" in found.out


# --------------------------------------------------------------------------------------
# Padding of the vocabulary
# --------------------------------------------------------------------------------------

_PADDED = {"embedding.word_embeddings.weight": "523-639", "output_layer.weight": "523-639"}


def spoil_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read of a row beyond the vocabulary gives what sevens look like."""
    healthy = MegatronSource.read_into

    def read_into(self: MegatronSource, name: str, box: Box, out: Words) -> None:
        healthy(self, name, box, out)
        if name in _PADDED:
            rows = np.arange(box.starts[0], box.stops[0])
            out[rows >= 523] = np.array(7.0, np.float32).view(np.uint32)

    monkeypatch.setattr(MegatronSource, "read_into", read_into)


def test_verify_fails_on_padding_that_is_not_zero_in_a_conversion_of_ours(
    run: Run, monkeypatch: pytest.MonkeyPatch, hf: Path, megatron: Path
) -> None:
    """Padded output rows enter the softmax of a training step; no HF tensor has them."""
    spoil_padding(monkeypatch)
    found = run("verify", "--hf-model", hf, "--megatron-path", megatron, "--select", "round_trip")
    assert found.code == 1
    assert "2 padded tensors are not zero" in found.out
    for name in _PADDED:
        assert f"{name}: 117 padding rows, 523 the first" in found.out


def test_verify_only_mentions_padding_that_training_has_moved(
    run: Run, monkeypatch: pytest.MonkeyPatch, hf: Path, megatron: Path
) -> None:
    """Without the record of an import the rows are the trainer's business."""
    (megatron / RECORD_NAME).unlink()
    spoil_padding(monkeypatch)
    found = run(
        "verify", "--hf-model", hf, "--megatron-path", megatron, "--select", "round_trip", "--json"
    )
    assert found.code == 0
    (case,) = json.loads(found.out)["cases"]
    assert case["details"]["nonzero_padding"] == [
        f"{name}: 117 padding rows, 523 the first" for name in _PADDED
    ]


# --------------------------------------------------------------------------------------
# Bad input is an error with a code
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["--hf-model", "--megatron-path"])
@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"input_ids": [[1, 523]]}, "input_ids must lie in [0, 523)"),
        ({"input_ids": [[1, -1]]}, "input_ids must lie in [0, 523)"),
        (
            {"input_ids": [[1, 2]], "position_ids": [0, 131_072]},
            "position_ids must lie in [0, 131072)",
        ),
        (
            {"input_ids": [[1, 2]], "position_ids": [-1, 0]},
            "position_ids must lie in [0, 131072)",
        ),
    ],
)
def test_logits_refuses_tokens_and_positions_the_model_does_not_have(
    run: Run, monkeypatch: pytest.MonkeyPatch, originals: Path, tmp_path: Path, side: str,
    arrays: Mapping[str, list[Any]], said: str,
) -> None:  # fmt: skip
    """The same words for both sides, before any model is loaded."""
    no_computing(monkeypatch)
    model = originals / side.strip("-").partition("-")[0]
    found = run(
        "logits", side, model, "--input", tokens(tmp_path, **arrays),
        "--output", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert found.code == 2
    assert found.err.startswith("BR104 ")
    assert said in found.err


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("nodir/z", "no such directory"),
        ("hf", "is a directory"),
        ("locked/z", "cannot be written to"),
    ],
)
def test_logits_refuses_an_output_that_cannot_be_written_before_computing(
    run: Run, monkeypatch: pytest.MonkeyPatch, hf: Path, tmp_path: Path, output: str, said: str
) -> None:
    """Hours of computing are not thrown away for a misspelt path."""
    no_computing(monkeypatch)
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(
        "os.access", lambda path, _mode: "locked" not in str(path)
    )  # root may write anywhere
    found = run(
        "logits", "--hf-model", hf, "--input", tokens(tmp_path, input_ids=[[1, 2]]),
        "--output", tmp_path / output,
    )  # fmt: skip
    assert found.code == 2
    assert found.err.startswith("BR300 ")
    assert said in found.err


def test_logits_on_a_gpu_that_is_not_there_could_not_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, hf: Path, tmp_path: Path
) -> None:
    """BR500 and exit code 3, which is no verdict on the model."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    no_computing(monkeypatch)
    found = run(
        "logits", "--hf-model", hf, "--device", "cuda",
        "--input", tokens(tmp_path, input_ids=[[1, 2]]), "--output", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert found.code == 3
    assert found.err.startswith("BR500 ")


@pytest.mark.parametrize("flags", [("--tp", "2"), ("--pp", "2"), ("--vp", "2")])
def test_logits_refuses_a_layout_where_no_ranks_will_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, hf: Path, tmp_path: Path, flags: tuple[str, str]
) -> None:
    """A flag that has no effect is a misunderstanding, not a detail."""
    no_computing(monkeypatch)
    found = run(
        "logits", "--hf-model", hf, *flags, "--input", tokens(tmp_path, input_ids=[[1, 2]]),
        "--output", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert found.code == 2
    assert found.err.startswith("BR001 ")
    assert "--megatron-path" in found.err


def one_error(found: Outcome, code: str) -> None:
    """Bad input: one diagnostic, exit code 2, nothing on stdout."""
    assert found.code == 2
    assert found.err.startswith(f"{code} ")
    assert found.err.count("\nBR") == 0
    assert "Traceback" not in found.err
    assert found.out == ""


@pytest.mark.parametrize("command", ["verify", "logits"])
def test_a_configuration_alone_is_not_a_checkpoint(
    run: Run, hf: Path, tmp_path: Path, command: str
) -> None:
    """Where weights are needed a config.json is refused once, not once per case."""
    arguments: list[str | Path] = ["--hf-model", hf / "config.json"]
    if command == "logits":
        arguments += ["--input", tokens(tmp_path, input_ids=[[1]]), "--output", tmp_path / "out"]
    found = run(command, *arguments)
    one_error(found, "BR300")
    assert "config.json" in found.err


@pytest.mark.parametrize("command", ["verify", "logits"])
def test_a_missing_shard_is_bad_input(run: Run, hf: Path, tmp_path: Path, command: str) -> None:
    """The file that the index names and that is not there, before any case runs."""
    victim = min(hf.glob("*.safetensors"))
    victim.unlink()
    arguments: list[str | Path] = ["--hf-model", hf]
    if command == "logits":
        arguments += ["--input", tokens(tmp_path, input_ids=[[1]]), "--output", tmp_path / "out"]
    found = run(command, *arguments)
    assert found.code == 2
    assert victim.name in found.err or "missing" in found.err
    assert "Traceback" not in found.err
    assert found.out == ""


def test_a_tensor_missing_on_either_side_is_named_before_any_case(
    run: Run, monkeypatch: pytest.MonkeyPatch, hf: Path, megatron: Path
) -> None:
    """The bridge's own accounting, for both sides."""
    monkeypatch.setattr("harness.cli.run_and_report", lambda *_, **__: pytest.fail("cases ran"))
    for victim in ("model.norm.weight", "model.embed_tokens.weight"):
        (shard,) = [p for p in hf.glob("*.safetensors") if victim in load_file(p)]
        kept = shard.read_bytes()
        tensors = load_file(shard)
        del tensors[victim]
        save_file(tensors, shard, metadata={"format": "pt"})
        found = run("verify", "--hf-model", hf)
        assert found.code == 2
        assert victim in found.err
        shard.write_bytes(kept)
    other = hf.parent / "other"
    write_checkpoint(toy_named("nano-4b"), other)
    found = run("verify", "--hf-model", other, "--megatron-path", megatron)
    one_error(found, "BR301")


def test_a_megatron_path_that_is_not_there_is_one_error(run: Run, hf: Path) -> None:
    """Not ten errors, one per case, with the exit code of a broken environment."""
    one_error(run("verify", "--hf-model", hf, "--megatron-path", "nope"), "BR300")


@pytest.mark.parametrize("layouts", ["", ",", " , "])
def test_an_empty_list_of_layouts_is_refused(run: Run, hf: Path, layouts: str) -> None:
    """Checks that look at no rank must not look like a proof."""
    one_error(run("verify", "--hf-model", hf, "--layouts", layouts), "BR001")


def test_a_bug_of_ours_exits_with_3_and_keeps_its_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 is for a check that failed: a crash proves nothing about a model."""

    def broken(_name: str) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(toys, "toy_named", broken)
    found = run("toy", "tied", "--hf-path", "unused")
    assert found.code == 3
    assert "Traceback (most recent call last)" in found.err
    assert "ZeroDivisionError: a bug" in found.err


# --------------------------------------------------------------------------------------
# Fields let through, and reports
# --------------------------------------------------------------------------------------


@pytest.mark.ranks
def test_a_carried_field_is_carried_through_a_whole_proof(
    run: Run, hf: Path, tmp_path: Path
) -> None:
    """Reading, converting there and back, coded tensors, the reference, and logits."""
    change_config(hf, novel_field=1)
    carry = ("--carry-field", "novel_field")
    refused = run("verify", "--hf-model", hf, "--layouts", "tp1-pp1")
    one_error(refused, "BR102")
    found = run("verify", "--hf-model", hf, "--layouts", "tp1-pp1", *carry)
    assert found.code == 0, found.out + found.err
    converted = run(
        "import", "--hf-model", hf, "--megatron-path", tmp_path / "new", "--verify", "full", *carry
    )
    assert converted.code == 0, converted.out + converted.err
    sides: dict[str, tuple[str | Path, ...]] = {
        "hf": ("--hf-model", hf, *carry),
        "megatron": ("--megatron-path", tmp_path / "new", "--hf-model", hf, *carry),
        "kept": ("--megatron-path", tmp_path / "new"),  # the import remembers
    }
    logits = []
    for name, flags in sides.items():
        found = run(
            "logits", *flags, "--input", tokens(tmp_path, input_ids=[[1, 2]]),
            "--output", tmp_path / f"{name}.safetensors", "--json",
        )  # fmt: skip
        assert found.code == 0, found.err
        assert json.loads(found.out)["shape"] == [1, 2, 523]
        logits.append(load_file(tmp_path / f"{name}.safetensors")["logits"])
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-5)
    np.testing.assert_array_equal(logits[1], logits[2])


def test_json_is_a_flag_and_the_only_thing_on_stdout(run: Run, hf: Path, tmp_path: Path) -> None:
    """Everywhere the same: one document; --report keeps it beside the logs as well."""
    report = tmp_path / "report"
    found = run("verify", "--json", "--hf-model", hf, "--select", "config", "--report", report)
    assert found.code == 0
    data = json.loads(found.out)
    assert data["counts"] == "1 passed, 0 failed"
    assert data == json.loads((report / "evidence.json").read_text("utf-8"))
    found = run("parity", "--json", "--select", "config/tied/float32")
    assert [case["id"] for case in json.loads(found.out)["cases"]] == ["config/tied/float32"]
    found = run("parity", "--json", "--list", "--select", "config/tied/float32")
    assert json.loads(found.out) == ["config/tied/float32"]
    found = run("toy", "--names", "--json")
    assert TOY in [one["name"] for one in json.loads(found.out)]
    found = run("toy", "tied", "--hf-path", tmp_path / "tied", "--json")
    assert json.loads(found.out)["hf_path"] == str(tmp_path / "tied")
    assert (tmp_path / "tied" / "config.json").is_file()


def test_a_name_that_looks_like_markup_is_printed_as_it_is(
    run: Run, originals: Path, tmp_path: Path
) -> None:
    """Brackets and colons in a directory's name are not styles and not pictures."""
    for name in ("x[g]y", "[b", "a:cat:b"):
        model = shutil.copytree(originals / "hf", tmp_path / name)
        found = run("verify", "--hf-model", model, "--select", "config/")
        assert found.code == 0, found.err
        assert name in found.out.split()


def test_no_case_comes_twice_when_all_get_the_same_layers(run: Run) -> None:
    """A suite that names several would count a pass for each."""
    for layers in ("local", "te-unfused", "te-fused"):
        found = run("parity", "--suite", "parity_gpu", "--layers", layers, "--list")
        ids = found.out.split()
        assert found.code == 0
        assert len(ids) == len(set(ids)) > 100
        live = [one for one in ids if one.startswith(("logits/", "rope/"))]
        assert all(one.endswith("/te-fused") is (layers == "te-fused") for one in live)
    everywhere = run("parity", "--suite", "parity_gpu", "--list").out.split()
    assert len(everywhere) == len(set(everywhere)) > len(ids)


def test_a_fault_that_cannot_come_in_is_no_fault_that_was_killed(run: Run) -> None:
    """Nothing tried is nothing proved."""
    found = run("faults", "--select", "mask-off-by-one", "--layers", "te", "--device", "cuda")
    assert found.code == 2
    assert "mask-off-by-one comes in at local layers only" in found.err
