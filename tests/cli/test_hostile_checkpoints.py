"""Checkpoints of strangers, given to the commands: refused with a code, and nothing runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemReader

from bridge.convert import import_checkpoint
from bridge.storage.input_files import FOLLOW_LINKS
from harness.toys import toy_named, write_checkpoint
from tests.cli.conftest import Run
from tests.exploits import EXPLOITS, archive

ITERATION = "iter_0000000"
SOME = (
    "os.system, protocol 2", "exec", "torch.load of bytes", "functools.partial", "a dotted name",
    "a method given by BUILD",
)  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Super-49B, `hf`, and the same for Megatron, `megatron`."""
    root = tmp_path_factory.mktemp("originals")
    write_checkpoint(toy_named("super-49b-v1"), root / "hf")
    import_checkpoint(root / "hf", root / "megatron")
    return root


@pytest.fixture
def models(originals: Path, tmp_path: Path) -> Path:
    """Copies of both, to be damaged."""
    shutil.copytree(originals, tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture(autouse=True)
def links_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a command sets is unset afterwards."""
    monkeypatch.setenv(FOLLOW_LINKS, "0")


def in_metadata(megatron: Path, payload: bytes) -> None:
    """What says where the tensors are."""
    (megatron / ITERATION / ".metadata").write_bytes(payload)


def in_common(megatron: Path, payload: bytes) -> None:
    """What the ranks share."""
    (megatron / ITERATION / "common.pt").write_bytes(archive(payload))


def in_a_record(megatron: Path, payload: bytes) -> None:
    """In place of the largest tensor, of just its length."""
    metadata = FileSystemReader(megatron / ITERATION).read_metadata()
    assert metadata.storage_data is not None
    record = max(metadata.storage_data.values(), key=lambda one: one.length)
    with (megatron / ITERATION / record.relative_path).open("r+b") as file:
        file.seek(record.offset)
        file.write(archive(payload, nbytes=record.length))


def in_legacy_rank(megatron: Path, payload: bytes) -> None:
    """The one file of a rank in the older format."""
    shutil.rmtree(megatron / ITERATION)
    (megatron / ITERATION / "mp_rank_00").mkdir(parents=True)
    (megatron / ITERATION / "mp_rank_00" / "model_optim_rng.pt").write_bytes(archive(payload))


@pytest.mark.parametrize("place", [in_metadata, in_common, in_a_record, in_legacy_rank])
@pytest.mark.parametrize("name", SOME)
def test_an_exploit_in_a_megatron_checkpoint_does_not_run(
    models: Path, tmp_path: Path, run: Run, name: str, place: Callable[[Path, bytes], None]
) -> None:
    """Wherever it lies, `export` and `verify` end with BR302 and the file is not made."""
    victim = tmp_path / "victim"
    place(models / "megatron", EXPLOITS[name](victim))
    hf, megatron = models / "hf", models / "megatron"
    ran = {
        "export": run("export", "--megatron-path", megatron, "--hf-path", tmp_path / "back"),
        "verify": run(
            "verify", "--hf-model", hf, "--megatron-path", megatron, "--layouts", "tp1-pp1",
            "--checks", "config,round_trip",
        ),
    }  # fmt: skip
    assert not victim.exists()
    for command, outcome in ran.items():
        # 3: a check of `verify` that could not be carried out, because of just that.
        assert outcome.code in {2, 3}, (command, outcome)
        said = outcome.err + outcome.out
        assert re.search("BR302 its pickle (names|calls) ", said), (command, outcome)
    assert "it may be hostile" in ran["export"].err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("command", ["logits", "generate"])
def test_a_command_that_runs_the_model_refuses_it_before(
    models: Path, tmp_path: Path, run: Run, command: str
) -> None:
    """Ranks start Megatron-Core, and Megatron-Core's own loader never sees the checkpoint."""
    victim = tmp_path / "victim"
    in_common(models / "megatron", EXPLOITS["exec"](victim))
    arguments: dict[str, list[str | Path]] = {
        "logits": ["--probe", "short", "--output", tmp_path / "o.safetensors"],
        "generate": ["--prompt", "a", "--max-new-tokens", "1"],
    }
    outcome = run(
        command,
        "--hf-model",
        models / "hf",
        "--megatron-path",
        models / "megatron",
        *arguments[command],
    )
    assert not victim.exists()
    assert outcome.code == 2
    assert outcome.err.startswith("BR302 its pickle names builtins.exec")


def test_pickles_beside_the_weights_are_neither_read_nor_carried(
    models: Path, tmp_path: Path, run: Run
) -> None:
    """A publisher's own `.bin` and `.pt` stay behind, and an import says so."""
    victim = tmp_path / "victim"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pth"):
        (models / "hf" / name).write_bytes(archive(EXPLOITS["exec"](victim)))
    outcome = run("import", "--hf-model", models / "hf", "--megatron-path", tmp_path / "megatron")
    assert outcome.code == 0, outcome.err
    assert not victim.exists()
    assert "not carried: pytorch_model.bin" in outcome.out
    carried = {path.name for path in (tmp_path / "megatron").rglob("*")}
    assert not carried & {"pytorch_model.bin", "training_args.bin", "optimizer.pt"}


# Links, FIFOs, names


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of this machine that is nobody's business."""
    path = tmp_path / "id_rsa"
    path.write_text("PRIVATE KEY")
    return path


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors.index.json"])
def test_a_link_to_a_private_file_is_not_carried_into_an_import(
    models: Path, tmp_path: Path, run: Run, secret: Path, name: str
) -> None:
    """BR307 names the link, and not a letter of what it leads to is shown or written."""
    path = models / "hf" / name
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    outcome = run("import", "--hf-model", models / "hf", "--megatron-path", tmp_path / "megatron")
    assert outcome.code == 2
    assert outcome.err.startswith("BR307 a link leads out of the directory")
    assert f"--> {path}" in outcome.err
    assert "--follow-links" in outcome.err
    assert "PRIVATE" not in outcome.err + outcome.out
    assert not (tmp_path / "megatron").exists()


def test_a_link_in_what_an_import_kept_is_not_carried_into_an_export(
    models: Path, tmp_path: Path, run: Run, secret: Path
) -> None:
    """The directory beside a Megatron checkpoint is no better known than the checkpoint."""
    path = next((models / "megatron" / "hf_source").glob("tokenizer*"))
    path.unlink()
    path.symlink_to(secret)
    outcome = run("export", "--megatron-path", models / "megatron", "--hf-path", tmp_path / "back")
    assert outcome.code == 2
    assert outcome.err.startswith("BR307 a link leads out")
    assert not (tmp_path / "back").exists()


def test_weights_on_another_disk_are_followed_on_request(
    models: Path, tmp_path: Path, run: Run
) -> None:
    """Refused without the flag, the same bytes with it, there and back."""
    disk = tmp_path / "disk"
    disk.mkdir()
    for path in (models / "hf").glob("*.safetensors"):
        shutil.move(path, disk / path.name)
        path.symlink_to(disk / path.name)
    command = ("import", "--hf-model", models / "hf", "--megatron-path", tmp_path / "megatron")
    refused = run(*command)
    assert (refused.code, refused.err[:5]) == (2, "BR307")
    assert run("verify", "--hf-model", models / "hf", "--checks", "config").code == 2

    followed = run(*command, "--follow-links")
    assert followed.code == 0, followed.err
    again = tmp_path / "megatron" / ITERATION / "__0_0.distcp"
    assert again.read_bytes() == (models / "megatron" / ITERATION / again.name).read_bytes()


@pytest.mark.parametrize("place", ["iteration", "rank", "distcp", "hf_source"])
def test_parts_of_a_megatron_checkpoint_that_are_links_out_are_refused(
    models: Path, tmp_path: Path, run: Run, place: str
) -> None:
    """An iteration, a rank's directory or a file of tensors: BR307; `--follow-links` reads it."""
    megatron = models / "megatron"
    if place == "rank":
        in_legacy_rank(megatron, EXPLOITS["exec"](tmp_path / "victim"))
    moved = {
        "iteration": megatron / ITERATION,
        "rank": megatron / ITERATION / "mp_rank_00",
        "distcp": megatron / ITERATION / "__0_0.distcp",
        "hf_source": megatron / "hf_source",
    }[place]
    shutil.move(moved, tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    command = ("export", "--megatron-path", megatron, "--hf-path", tmp_path / "back")
    outcome = run(*command)
    assert outcome.code == 2
    assert outcome.err.startswith("BR307 a link leads out")
    followed = run(*command, "--follow-links")
    # The rank's is an exploit, which is looked at then, and refused for what it is.
    assert followed.code == (2 if place == "rank" else 0), followed.err
    assert "BR307" not in followed.err


@pytest.mark.parametrize(
    "name",
    [
        "hf/config.json", "hf/model.safetensors.index.json", "hf/tokenizer.json",
        "megatron/latest_checkpointed_iteration.txt", f"megatron/{ITERATION}/.metadata",
        f"megatron/{ITERATION}/metadata.json", f"megatron/{ITERATION}/common.pt",
        f"megatron/{ITERATION}/__0_0.distcp", "megatron/nemotron_bridge.json",
        "megatron/hf_source/config.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["FIFO", "device", "directory"])
def test_what_is_no_file_is_refused_and_never_waited_for(
    models: Path, tmp_path: Path, run: Run, name: str, kind: str
) -> None:
    """Nobody writes to a FIFO: opening one for reading would be the end of the conversion."""
    path = models / name
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    if name.startswith("hf"):
        outcome = run("import", "--hf-model", models / "hf", "--megatron-path", tmp_path / "m")
    else:
        outcome = run("export", "--megatron-path", models / "megatron", "--hf-path", tmp_path / "h")
    # Of a side file that is none the import says that it stays behind. Without the record of its
    # import, an export cuts the weights into files of its own.
    left = name.endswith(("tokenizer.json", "nemotron_bridge.json"))
    assert outcome.code == (0 if left else 2), outcome
    assert left or outcome.err.startswith("BR"), outcome
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "..\\outside.safetensors", "a\0.safetensors", "",
     ".", "..", "sub/x.safetensors", "\x1b[2J.safetensors", "x" * 5000 + ".safetensors"],
)  # fmt: skip
def test_names_that_leave_the_directory_are_refused(
    models: Path, tmp_path: Path, run: Run, name: str
) -> None:
    """In the index and in the record of an import: refused with a code, shown without effect."""
    index = models / "hf" / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"] = dict.fromkeys(said["weight_map"], name)
    index.write_text(json.dumps(said))
    outcome = run("import", "--hf-model", models / "hf", "--megatron-path", tmp_path / "m")
    assert outcome.code == 2
    assert outcome.err.startswith("BR30")

    record = models / "megatron" / "nemotron_bridge.json"
    said = json.loads(record.read_text())
    said["shards"] = {name: next(iter(said["shards"].values()))}
    record.write_text(json.dumps(said))
    outcome = run("export", "--megatron-path", models / "megatron", "--hf-path", tmp_path / "h")
    assert outcome.code == 2
    assert outcome.err.startswith("BR302")
    assert "\x1b" not in outcome.err
    assert not (tmp_path / "outside.safetensors").exists()


@pytest.mark.parametrize(
    "said",
    ["../iter_0000000", "/etc", "iter_0000000", "-1", "0x0", "1e3", "\0", "9" * 400, "٣", ""],
)
def test_a_tracker_names_an_iteration_and_no_path(
    models: Path, tmp_path: Path, run: Run, said: str
) -> None:
    """Digits or `release`, and nothing that a path could be made of."""
    (models / "megatron" / "latest_checkpointed_iteration.txt").write_text(said)
    outcome = run("export", "--megatron-path", models / "megatron", "--hf-path", tmp_path / "h")
    assert outcome.code == 2
    assert outcome.err.startswith("BR302 the tracker")
