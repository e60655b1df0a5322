"""`logits` in one place, `verify --reference-logits` in another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from bridge.convert import import_checkpoint
from bridge.errors import RemoteCodeError
from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests.cli.conftest import Run

TOY = "super-49b-v1_5"
IDS = np.array([[1, 522, 0, 17], [5, 4, 3, 2]])
Arguments = tuple[str | Path, ...]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `hf`, its conversion `m`, and `in`, a probe of the user's own."""
    root = tmp_path_factory.mktemp("detached")
    write_checkpoint(toy_named(TOY), root / "hf")
    import_checkpoint(root / "hf", root / "m")
    save_file({"input_ids": IDS, "position_ids": np.array([0, 9, 8192, 131071])}, root / "in")
    return root


def logits(run: Run, made: Path, name: str, *flags: str | Path) -> Path:
    """Write a reference, once for all tests of this file."""
    path = made / f"{name}.safetensors"
    if not path.exists():
        found = run("logits", "--hf-model", made / "hf", *flags, "--output", path)
        assert found.code == 0, found.err
    return path


def with_metadata(path: Path, target: Path, logits: Any = None, **changes: str) -> Path:  # noqa: ANN401 - an array
    """A copy of a file of logits that says, or holds, something else."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() | changes
    found = load_file(path)["logits"] if logits is None else logits
    save_file({"logits": found}, target, metadata=metadata)
    return target


def no_model(*_: object, **__: object) -> None:
    """What loading says where the checkpoint's own code does not run."""
    raise RemoteCodeError("the checkpoint's own code computes wrong logits", where="hf")


def test_logits_say_what_they_were_made_from(run: Run, made: Path, tmp_path: Path) -> None:
    """In the file, and with --json on stdout."""
    found = run(
        "logits",
        "--hf-model",
        made / "hf",
        "--probe",
        "short",
        "--output",
        tmp_path / "o",
        "--json",
    )
    assert found.code == 0, found.err
    told = json.loads(found.out)["made_from"]
    with safe_open(tmp_path / "o", framework="numpy") as file:
        assert file.metadata() == told
    assert told["implementation"] == "bridge.decilm.modeling.DeciLMForCausalLM"
    assert told["dtype"] == "float32"
    assert json.loads(told["versions"])["transformers"] == transformers.__version__


@pytest.mark.ranks
def test_both_sides_account_for_the_same_model_and_inputs(run: Run, made: Path) -> None:
    """Only who computed, and with what, differs."""
    found = {}
    for side, flags in {
        "hf": ("--hf-model", made / "hf"),
        "m": ("--megatron-path", made / "m", "--tp", "2"),
    }.items():
        output = made / f"side-{side}"
        done = run("logits", *flags, "--input", made / "in", "--output", output)
        assert done.code == 0, done.err
        with safe_open(output, framework="numpy") as file:
            found[side] = file.metadata()
    for name in ("config_sha256", "spec_sha256", "weights_sha256", "inputs_sha256", "dtype"):
        assert found["hf"][name] == found["m"][name]
    assert "tp2-pp1" in found["m"]["implementation"]
    assert "inv_freq_float32" not in found["m"]


@pytest.mark.ranks
def test_files_stand_for_a_model_that_does_not_run_here(
    run: Run, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    """RoPE and every probe are judged; what needs the model itself is left out, and said so."""
    files = [logits(run, made, name, "--probe", name) for name in ("short", "long")]
    files.append(logits(run, made, "input", "--input", made / "in"))
    monkeypatch.setattr("harness.bench.load_hf_model", no_model)
    found = run(
        "verify", "--hf-model", made / "hf", "--megatron-path", made / "m", "--layouts", "tp1-pp1",
        "--checks", "rope,logits,generation", "--input", made / "in", "--json",
        *(flag for file in files for flag in ("--reference-logits", file)),
    )  # fmt: skip
    assert found.code == 0, found.out + found.err
    data = json.loads(found.out)
    assert data["counts"] == "4 passed, 0 failed, 1 not run (reference)"
    judged = {one["probe"]: one for one in data["cases"] if one["check"] == "logits"}
    assert judged.keys() == {"short", "long", "input"}
    for file, probe in zip(files, ("short", "long", "input"), strict=True):
        assert judged[probe]["details"]["reference"].startswith(f"{file}: bridge.decilm")


@pytest.mark.ranks
def test_without_files_a_model_that_does_not_run_is_an_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    """Nothing stands for it: a proof that could not be carried out."""
    monkeypatch.setattr("harness.bench.load_hf_model", no_model)
    found = run(
        "verify", "--hf-model", made / "hf", "--layouts", "tp1-pp1", "--select", "logits/hf/tp1-pp1"
    )
    assert found.code == 3
    assert "BR105" in found.out


@pytest.mark.ranks
def test_the_file_is_what_logits_are_judged_by(run: Run, made: Path, tmp_path: Path) -> None:
    """A reference that is wrong beyond doubt is found to be, and not overlooked."""
    healthy = logits(run, made, "short", "--probe", "short")
    wrong = with_metadata(healthy, tmp_path / "wrong", logits=-load_file(healthy)["logits"])
    found = run(
        "verify", "--hf-model", made / "hf", "--megatron-path", made / "m", "--layouts", "tp1-pp1",
        "--select", "logits/hf/tp1-pp1/float32/short", "--reference-logits", wrong,
    )  # fmt: skip
    assert found.code == 1
    assert "the reference's logits are wrong" in found.out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spec_sha256": "0"}, "other configuration"),
        ({"config_sha256": "0"}, "other configuration"),
        ({"weights_sha256": "0"}, "other weights"),
        ({"inputs_sha256": "0"}, "other inputs: none of the probes short, long"),
        ({"dtype": "bfloat16"}, "other dtype"),
        ({"logits": np.full((2, 24, 523), np.nan, np.float32)}, "not finite"),
        ({"logits": np.zeros((2, 24, 524), np.float32)}, "have shape (2, 24, 524)"),
    ],
)
def test_a_file_made_from_anything_else_is_one_error(
    run: Run, made: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """Which file and what differs; exit code 2, and no case has run."""
    healthy = logits(run, made, "short", "--probe", "short")
    other = with_metadata(healthy, tmp_path / "other.safetensors", **changes)
    found = run("verify", "--hf-model", made / "hf", "--reference-logits", other)
    assert found.code == 2
    assert found.err.startswith("HN104 these logits are no reference for this model")
    assert f"{other}: {said}" in found.err.replace("logits are ", "").replace("logits have", "have")
    assert found.out == ""


def test_weights_that_changed_since_are_other_weights(run: Run, made: Path, tmp_path: Path) -> None:
    """One element of one tensor, in the checkpoint."""
    file = logits(run, made, "short", "--probe", "short")
    hf = Path(shutil.copytree(made / "hf", tmp_path / "hf"))
    shard = min(hf.glob("*.safetensors"))
    tensors = {name: tensor.copy() for name, tensor in load_file(shard).items()}
    next(iter(tensors.values())).reshape(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    found = run("verify", "--hf-model", hf, "--reference-logits", file)
    assert found.code == 2
    assert "other weights" in found.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--checks", ""), "BR001 --checks names no check"),
        (("--checks", "logits,lodgits"), "BR001 no check is called lodgits"),
        (("--checks", "golden"), "BR001 no check is called golden"),
        (("--input", "nowhere"), "BR300 cannot read the input"),
        (("--reference-logits", "nowhere"), "HN104 cannot read the reference"),
    ],
)
def test_bad_usage_of_verify_is_one_error(
    run: Run, made: Path, arguments: Arguments, said: str
) -> None:
    """With what would have been right."""
    found = run("verify", "--hf-model", made / "hf", *arguments)
    assert found.code == 2
    assert found.err.startswith(said)
    assert found.out == ""


@pytest.mark.parametrize(
    "positions", [[3, 2, 1, 0], [[0, 1, 2, 3], [0, 1, 2, 4]], [0, 1, 2, 131072]]
)
def test_a_probe_needs_positions_that_every_part_can_take(
    run: Run, made: Path, tmp_path: Path, positions: list[Any]
) -> None:
    """Increasing, the same for every sequence, and within the context."""
    save_file({"input_ids": IDS, "position_ids": np.array(positions)}, tmp_path / "in")
    found = run("verify", "--hf-model", made / "hf", "--input", tmp_path / "in")
    assert found.code == 2
    assert found.err.startswith("BR104")


def test_checks_and_a_probe_of_ones_own_make_the_cases(run: Run, made: Path) -> None:
    """`--list` shows them; the layout that others are compared with is not compared with itself."""
    found = run(
        "verify", "--hf-model", made / "hf", "--input", made / "in", "--list",
        "--checks", "layouts,config", "--layouts", "tp1-pp1,tp2-pp1",
    )  # fmt: skip
    assert found.out.split() == [
        "config/hf/float32",
        *(f"layouts/hf/tp2-pp1/float32/{probe}" for probe in ("short", "long", "input")),
    ]


def test_logits_replace_a_file_where_that_is_asked_for(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one step: until then, and where it fails, the old one is there, and no other."""
    path = tmp_path / "o.safetensors"
    path.write_text("something else")
    command = ("logits", "--hf-model", made / "hf", "--probe", "short", "--output", path)
    refused = run(*command)
    assert (refused.code, path.read_text()) == (2, "something else")
    assert refused.err.startswith("BR304 the output already exists\n")

    def full(_tensors: object, target: Path, **_: object) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full)
        failed = run(*command, "--overwrite")
    assert (failed.code, path.read_text()) == (2, "something else")
    assert failed.err.startswith("BR300 cannot write the logits: [Errno 28] No space left")
    assert list(tmp_path.iterdir()) == [path]
    assert run(*command, "--overwrite").code == 0
    assert load_file(path)["logits"].ndim == 3
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("flags", [(), ("--probe", "short", "--input", "in")])
def test_logits_take_one_input(run: Run, made: Path, flags: Arguments) -> None:
    """Neither none nor two."""
    found = run("logits", "--hf-model", made / "hf", *flags, "--output", made / "unused")
    assert found.code == 2
    assert found.err.startswith("BR001 the model needs one input")
