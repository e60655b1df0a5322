"""The conversion commands as a user runs them: stdout, stderr, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests.cli.conftest import Run


VARIANTS = Path(__file__).parents[2] / "suites" / "variants"
ULTRA = VARIANTS / "Llama-3_1-Nemotron-Ultra-253B-v1.json"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small 51B with linear replacements."""
    write_checkpoint(toy_named("51b"), tmp_path / "hf", dtype="bfloat16")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ("Llama-3.1-Nemotron-Nano-4B-v1.1", "4,512,746,496"),
        ("Llama-3.1-Nemotron-Nano-8B-v1", "8,030,261,248"),
        ("Llama-3.1-Nemotron-70B-Instruct-HF", "70,553,706,496"),
        ("Llama-3_3-Nemotron-Super-49B-v1", "49,867,145,216"),
        ("Llama-3_3-Nemotron-Super-49B-v1_5", "49,867,145,216"),
        ("Llama-3_1-Nemotron-Ultra-253B-v1", "253,401,268,224"),
    ],
)
def test_inspect_states_the_published_parameter_count(
    run: Run, config: str, parameters: str
) -> None:
    """Each real configuration, with its stages for a layout."""
    found = run("inspect", VARIANTS / f"{config}.json", "--tp", "4", "--pp", "2")
    assert found.code == 0
    assert f"{parameters} parameters" in found.out
    assert "layout tp4-pp2" in found.out
    assert found.err == ""


def test_inspect_as_json_accounts_for_every_parameter_over_the_stages(run: Run) -> None:
    """Blocks and stages each add up to the model, padding aside."""
    found = run("inspect", ULTRA, "--pp", "4", "--json")
    data = json.loads(found.out)
    ends = data["embedding_parameters"] + data["output_parameters"]
    kinds = sum(kind["num_blocks"] * kind["parameters_per_block"] for kind in data["block_kinds"])
    assert data["num_parameters"] == kinds + ends
    padding = 2 * (data["padded_vocab_size"] - data["vocab_size"]) * data["hidden_size"]
    assert data["num_parameters"] + padding == sum(s["parameters"] for s in data["stages"])
    assert [sum(stage["num_layers"] for stage in data["stages"])] == [162]


def test_inspect_with_virtual_stages_sums_what_each_pipeline_rank_holds(run: Run) -> None:
    """A rank's memory is that of all its model parts together."""
    data = json.loads(run("inspect", ULTRA, "--pp", "4", "--vp", "2", "--tp", "8", "--json").out)
    for rank in data["pp_ranks"]:
        parts = [one for one in data["stages"] if one["pp_rank"] == rank["pp_rank"]]
        assert len(parts) == 2
        assert rank["nbytes_per_rank"] == sum(part["nbytes_per_rank"] for part in parts)
    shown = run("inspect", ULTRA, "--pp", "4", "--vp", "2", "--tp", "8").out.splitlines()
    assert len(data["pp_ranks"]) == 4
    assert shown[-5].split()[:3] == ["pp", "rank", "parameters"]
    weights = [rank["weights"] for rank in data["memory"]["pp_ranks"]]
    assert weights == [rank["nbytes_per_rank"] for rank in data["pp_ranks"]]


def test_import_and_export_give_the_directory_back(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    """The two commands of the README, and what they say."""
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    imported = run("import", "--hf-model", checkpoint, "--megatron-path", megatron, "--json")
    assert imported.code == 0
    assert json.loads(imported.out)["verified"] is True
    exported = run("export", "--megatron-path", megatron, "--hf-path", back)
    assert exported.code == 0
    assert "verified bit by bit" in exported.out
    for path in checkpoint.iterdir():
        assert path.read_bytes() == (back / path.name).read_bytes()


def test_a_dtype_and_one_file_are_there_for_the_asking(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    """Two workers count together; the report says what rounding cost."""
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert run("import", "--hf-model", checkpoint, "--megatron-path", megatron).code == 0
    exported = run(
        *("export", "--megatron-path", megatron, "--hf-path", back, "--dtype", "float16"),
        *("--max-shard-size", "single", "--workers", "2", "--json"),
    )
    assert exported.code == 0
    report = json.loads(exported.out)
    assert report["rounding"]["dtype"] == "float16"
    assert report["rounding"]["changed"] > 0
    assert [path.name for path in back.glob("*.safetensors")] == ["model.safetensors"]
    alone = run(
        *("export", "--megatron-path", megatron, "--hf-path", tmp_path / "alone"),
        *("--dtype", "float16", "--json"),
    )
    assert json.loads(alone.out)["rounding"] == report["rounding"]
    refused = run(
        "export", "--megatron-path", megatron, "--hf-path", tmp_path / "x", "--dtype", "int8"
    )
    assert refused.code == 2


def test_import_tells_the_flags_megatron_lm_needs(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    """RoPE scaling and epsilon are not restored by --use-checkpoint-args."""
    found = run("import", "--hf-model", checkpoint, "--megatron-path", tmp_path / "megatron")
    assert "--use-rope-scaling --rope-scaling-factor 8.0" in found.out
    assert "--norm-epsilon 1e-05" in found.out
    assert "--ckpt-format torch_dist --use-checkpoint-args --finetune" in " ".join(
        found.out.split()
    )


def test_overflow_is_allowed_only_where_something_is_rounded(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    """Without --dtype the flag would mean nothing."""
    found = run(
        *("import", "--hf-model", checkpoint, "--megatron-path", tmp_path / "megatron"),
        "--allow-overflow",
    )
    assert found.code == 2
    assert "BR001" in found.err


def test_plan_shows_which_rectangle_becomes_which(run: Run, checkpoint: Path) -> None:
    """One line per tile, a pattern selects, and the weights are accounted for."""
    found = run("plan", checkpoint, "--tensor", "decoder.layers.*.mlp.linear_fc1.weight")
    lines = found.out.splitlines()
    assert all("gate_proj" in line or "up_proj" in line for line in lines[:-1])
    assert "weights accounted for" in lines[-1]
    found = run("plan", checkpoint, "--tensor", "[[[[")
    assert (found.code, found.out) == (2, "")
    assert "BR001 no Megatron parameter matches the pattern\n  --> --tensor [[[[" in found.err


def test_synthesize_writes_the_same_bytes_twice(run: Run, tmp_path: Path) -> None:
    """A synthetic checkpoint depends on the configuration and the seed alone."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(toy_named("ultra-253b").config))
    for name in ("one", "two"):
        assert run("synthesize", "--config", config, "--hf-path", tmp_path / name).code == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert run("plan", tmp_path / "one").code == 0
    again = run("synthesize", "--config", config, "--hf-path", tmp_path / "one", "--resume")
    assert (again.code, "nothing to do" in again.out) == (0, True)
    said = run(
        "synthesize", "--config", config, "--hf-path", tmp_path / "one", "--resume", "--json"
    )
    found = json.loads(said.out)
    weights = sum(path.stat().st_size for path in (tmp_path / "one").glob("*.safetensors"))
    assert (found["nothing_to_do"], 0 < weights - found["nbytes"] < 50_000) == (True, True)


def test_list_names_all_seven(run: Run) -> None:
    """The family, with its counts."""
    found = run("list", "--json")
    assert len(json.loads(found.out)) == 7


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["inspect", "no/such/place"], 2, "BR300"),
        (["inspect", str(ULTRA), "--tp", "3"], 2, "help: choose tensor_model_parallel_size from"),
        (["inspect", str(ULTRA), "--pp", "200"], 2, "BR202"),
        (["import", "--hf-model", "x"], 2, "--megatron-path"),
        (
            ["import", "--hf-model", ".", "--megatron-path", "y", "--memory-budget", "many"],
            2,
            "BR001",
        ),
        (
            ["import", "--hf-model", ".", "--megatron-path", "y", "--memory-budget", "1kB"],
            2,
            "BR001 a memory budget of 1kB cannot be kept",
        ),
        (["inspect", str(ULTRA), "--revision", "main"], 2, "BR001"),
        (["export", "--megatron-path", "nowhere", "--hf-path", "y"], 2, "BR300"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_a_mistake_is_one_clear_error_without_a_traceback(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int,
    says: str,
) -> None:  # fmt: skip
    """Exit code 2, the diagnostic on stderr, nothing on stdout."""
    monkeypatch.chdir(tmp_path)
    found = run(*arguments)
    assert code == found.code
    assert says in found.err
    assert "Traceback" not in found.err
    assert found.out == ""
    assert not list(tmp_path.iterdir())


def test_all_refused_fields_are_named_in_one_error(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    """The error's shape: code and message, one arrow per place, one help line."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["block_configs"][1]["attention"]["window_length"] = 4096
    config["attention_bias"] = True
    config["novel_field"] = 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    found = run("import", "--hf-model", checkpoint, "--megatron-path", tmp_path / "megatron")
    first, *places, last = found.err.strip().splitlines()
    assert first == "BR103 3 fields of the configuration cannot be honoured"
    assert [place.startswith("  --> ") for place in places] == [True] * 3
    assert "block_configs[1].attention.window_length=4096" in found.err
    assert last.startswith("help: ")
    assert not (tmp_path / "megatron").exists()


def test_an_unknown_field_passes_when_it_is_named(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    """--carry-field lets one field through, and it comes back."""
    config = json.loads((checkpoint / "config.json").read_text()) | {"novel_field": 1}
    (checkpoint / "config.json").write_text(json.dumps(config))
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    carry = ("--carry-field", "novel_field")
    assert run("import", "--hf-model", checkpoint, "--megatron-path", megatron, *carry).code == 0
    assert run("export", "--megatron-path", megatron, "--hf-path", back).code == 0  # remembered
    assert json.loads((back / "config.json").read_text())["novel_field"] == 1


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["inspect", str(ULTRA)], "{'torch', 'transformers', 'megatron', 'hypothesis'}"),
        (["--help"], "{'torch', 'transformers', 'megatron', 'hypothesis', 'numpy'}"),
    ],
    ids=["inspect", "help"],
)
def test_commands_that_need_no_tensors_start_without_them(arguments: list[str], heavy: str) -> None:
    """`inspect` imports neither torch nor Megatron, the help not even NumPy."""
    code = (
        "import sys; sys.argv[0] = 'nemotron-bridge'\n"
        "from harness.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"heavy = {heavy} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(  # noqa: S603 (our own interpreter)
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
