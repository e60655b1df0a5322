"""The verifying commands, as a user calls them: streams, exit codes, places."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from bridge.convert import import_checkpoint
from bridge.decilm import load_reference
from harness.locations import suites_dir
from harness.toys import toy_named, write_checkpoint
from tests.commands import Run

pytestmark = pytest.mark.ranks
TOY = "super-49b-v1_5"
NANO = str(suites_dir() / "variants" / "Llama-3.1-Nemotron-Nano-8B-v1.json")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint."""
    directory = tmp_path_factory.mktemp("models") / "super-toy"
    write_checkpoint(toy_named(TOY), directory)
    return directory


@pytest.fixture(scope="module")
def megatron(hf: Path) -> Path:
    """The same as torch_dist."""
    directory = hf.parent / "super-megatron"
    import_checkpoint(hf, directory)
    return directory


def nemotron_bridge(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "harness", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_verify_passes_on_a_healthy_checkpoint_and_leaves_evidence(
    hf: Path, tmp_path: Path
) -> None:
    """Exit code 0, one JSON document and nothing else on stdout, evidence and rank logs kept."""
    done = nemotron_bridge(
        "verify", "--hf-model", hf, "--layouts", "tp2-pp1", "--json", "--report", tmp_path,
        "--checks", "config,round_trip,placement,rope,logits",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["verdict"] == "passed"
    assert data["counts"] == "6 passed, 0 failed"
    assert {"config", "round_trip", "placement", "rope", "logits"} == {
        one["check"] for one in data["cases"]
    }
    assert data == json.loads((tmp_path / "evidence.json").read_text("utf-8"))
    assert sorted(p.name for p in (tmp_path / "ranks").iterdir()) == ["rank0.log", "rank1.log"]


def test_verify_names_the_place_where_two_key_heads_were_exchanged(
    run: Run, hf: Path, tmp_path: Path
) -> None:
    """Layer, tensor, rows and whose they are; exit code 1."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in hf.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    name = "model.layers.6.self_attn.k_proj.weight"
    (shard,) = [path for path in damaged.glob("*.safetensors") if name in load_tensors(path)]
    tensors = load_tensors(shard)
    first, second = tensors[name].chunk(2)
    tensors[name] = torch.cat([second, first]).contiguous()
    save_tensors(tensors, shard, metadata={"format": "pt"})
    import_checkpoint(damaged, tmp_path / "megatron")

    done = run(
        "verify", "--hf-model", hf, "--megatron-path", tmp_path / "megatron",
        "--checks", "round_trip",
    )  # fmt: skip
    assert done.code == 1
    assert "FAILED round_trip/super-toy/tp1-pp1/float32" in done.out
    # 16 query heads of 8 channels in 2 groups: a group's key follows its 64 query rows.
    assert (
        f"{name}[0, 0]: 2048 elements differ, this one first; in "
        "decoder.layers.6.self_attention.linear_qkv.weight[64, 0], rows 64-71 = query group 0's key"
    ) in done.out
    assert "0 passed, 1 failed" in done.out


def test_verify_names_a_rope_value_that_the_megatron_checkpoint_has_otherwise(
    run: Run, hf: Path, tmp_path: Path
) -> None:
    """Weights alone are equal; what Megatron would do with them is not."""
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in hf.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    config = json.loads((changed / "config.json").read_text("utf-8"))
    config["rope_scaling"]["low_freq_factor"] = 2.0
    (changed / "config.json").write_text(json.dumps(config), "utf-8")
    import_checkpoint(changed, tmp_path / "megatron")

    done = run(
        "verify", "--hf-model", hf, "--megatron-path", tmp_path / "megatron",
        "--checks", "round_trip",
    )  # fmt: skip
    assert done.code == 1
    assert "low_freq_factor=2.0" in done.out


def test_logits_of_both_sides_agree_and_are_the_models_own(
    run: Run, hf: Path, megatron: Path, tmp_path: Path
) -> None:
    """(batch, seq, vocab_size), float32, unpadded; positions as given, per row too."""
    ids = np.array([[1, 522, 0, 17], [5, 4, 3, 2]])
    positions = np.array([[0, 9, 8192, 131071], [0, 1, 2, 3]])
    save_file({"input_ids": ids, "position_ids": positions}, tmp_path / "in.safetensors")
    outputs = {}
    sides: dict[str, list[str | Path]] = {
        "hf": ["--hf-model", hf],
        "megatron": ["--megatron-path", megatron, "--tp", "2", "--pp", "2"],
    }
    for side, flags in sides.items():
        done = run(
            "logits", *flags, "--input", tmp_path / "in.safetensors",
            "--output", tmp_path / f"{side}.safetensors",
        )  # fmt: skip
        assert done.code == 0, done.err
        (outputs[side],) = load_file(tmp_path / f"{side}.safetensors").values()
    model = load_reference(hf)
    with torch.no_grad():
        expected = model(
            torch.from_numpy(ids),
            position_ids=torch.from_numpy(positions),
            attention_mask=torch.ones(2, 4, dtype=torch.int64),
        ).logits.numpy()
    for found in outputs.values():
        assert found.shape == (2, 4, 523)
        assert found.dtype == np.float32
    np.testing.assert_array_equal(outputs["hf"], expected)
    np.testing.assert_allclose(outputs["megatron"], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["parity", "--select", "no-such-case"], 2, "HN101 none of"),
        (["parity", "--suite", "no-such-suite"], 2, "HN101 no suite"),
        (["verify", "--hf-model", "/no/such/model"], 2, "BR300 no such file or directory"),
        (
            [
                "verify",
                "--hf-model",
                NANO,
                "--layouts",
                "tp2xpp1",
            ],
            2,
            "HN101 no layout is called",
        ),
        (["logits", "--input", "/no/such", "--output", "o"], 2, "BR300 cannot read the input"),
    ],
)
def test_bad_usage_is_said_on_stderr_with_exit_code_2(
    run: Run, arguments: list[str], code: int, said: str
) -> None:
    """Code, place, help; no traceback, and nothing on stdout."""
    done = run(*arguments)
    assert code == done.code
    assert said in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_a_layout_that_does_not_fit_the_model_is_refused_before_any_work(
    run: Run, hf: Path
) -> None:
    """16 heads over 3 ranks: bad usage, not a failed check."""
    done = run("verify", "--hf-model", hf, "--layouts", "tp1-pp1,tp3-pp1")
    assert done.code == 2
    assert "BR201 tensor_model_parallel_size=3" in done.err
    assert done.out == ""


def test_an_interrupted_run_ends_with_130_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C while ranks are at work."""
    log = tmp_path / "report" / "ranks" / "rank0.log"
    command = [sys.executable, "-m", "harness", "parity", "--report", str(tmp_path / "report")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(  # noqa: S603 - our own command
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while not log.exists():  # the first rank is there
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_list_prints_the_selected_ids_and_runs_nothing(run: Run) -> None:
    """The dry run."""
    done = run("parity", "--list", "--select", "rope/tied/tp2")
    assert done.code == 0
    assert done.out.split() == ["rope/tied/tp2-pp1/float32", "rope/tied/tp2-pp2/float32"]


def test_help_imports_neither_torch_nor_transformers() -> None:
    """It is there at once."""
    code = (
        "import sys\n"
        "from harness.cli import app\n"
        "from typer.testing import CliRunner\n"
        "found = CliRunner().invoke(app, ['verify', '--help'])\n"
        "assert found.exit_code == 0 and '--layouts' in found.output, found.output\n"
        "print([name for name in ('torch', 'transformers', 'megatron') if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own
    assert done.stdout.strip() == "[]"
