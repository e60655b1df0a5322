"""`generate` as a user types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer

from bridge.convert import import_checkpoint
from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests.cli.conftest import Run

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for one in messages %}{% if one.role == 'system' %}w1 {% else %}w2 {% endif %}"
    "{{ one.content }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
)
"""Over the toys' tokenizer, whose words are w0, w1, ..., the tokens of those numbers."""


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Super-49B that chats."""
    path = tmp_path_factory.mktemp("generate") / "hf"
    write_checkpoint(toy_named("super-49b-v1"), path, dtype="float32")
    settings = json.loads((path / "tokenizer_config.json").read_bytes())
    settings["chat_template"] = TEMPLATE
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def megatron(hf: Path) -> Path:
    """The same, imported."""
    path = hf.with_name("megatron")
    import_checkpoint(hf, path)
    return path


@pytest.fixture(scope="module")
def expected(hf: Path) -> dict[str, list[int]]:
    """What transformers makes of prompts greedily, in six tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    import bridge.decilm  # noqa: F401 - registers it

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    found = {}
    for prompt in ("w5 w7", "w9 w11 w4 w400", "w1 w8 w2 w5 w7 w3"):
        ids = torch.tensor([[int(word[1:]) for word in prompt.split()]])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
            pad_token_id=0, temperature=None, top_p=None,
        )  # fmt: skip
        found[prompt] = made[0, ids.shape[1] :].tolist()
    return found


def words(token_ids: list[int]) -> str:
    """Their text."""
    return " ".join(f"w{one}" for one in token_ids)


def test_one_prompt_appears_as_it_is_written(
    run: Run, hf: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token after token on stdout, what it took on stderr."""
    pieces: list[str] = []
    echo = typer.echo

    def watched(message: str, *, nl: bool = True) -> None:
        pieces.append(message)
        echo(message, nl=nl)

    monkeypatch.setattr(typer, "echo", watched)
    found = run("generate", "--hf-model", hf, "--prompt", "w5 w7", "--max-new-tokens", "6")
    assert (found.code, found.out) == (0, words(expected["w5 w7"]) + "\n")
    assert len(pieces) == 7
    assert all(pieces[:6])
    assert found.err.startswith("6 tokens in ")
    assert found.err.count("\n") == 1


def test_a_megatron_checkpoint_alone_will_do_over_ranks_started_here(
    run: Run, megatron: Path, expected: dict[str, list[int]], tmp_path: Path
) -> None:
    """Two ranks; tokenizer and ends are those that the import has kept; results in order."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "w9 w11 w4 w400"}\n{"token_ids": [5, 7]}\n'
        '{"messages": [{"role": "system", "content": "w8"}, {"role": "user", "content": "w5 w7"}]}'
    )
    found = run(
        "generate", "--megatron-path", megatron, "--prompts", file, "--tp", "2",
        "--max-new-tokens", "6", "--json",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert [json.loads(line) for line in found.out.splitlines()] == [
        {
            "index": index,
            "prompt": prompt,
            "num_prompt_tokens": num,
            "token_ids": expected[text],
            "text": words(expected[text]),
            "finish_reason": "length",
        }
        for index, (prompt, num, text) in enumerate(
            [
                ("w9 w11 w4 w400", 4, "w9 w11 w4 w400"),
                (None, 2, "w5 w7"),
                (
                    [{"role": "system", "content": "w8"}, {"role": "user", "content": "w5 w7"}],
                    6,
                    "w1 w8 w2 w5 w7 w3",
                ),
            ]
        )
    ]


def test_a_chat_of_flags_and_several_texts(
    run: Run, hf: Path, expected: dict[str, list[int]]
) -> None:
    """Each under its name; the weights may be Hugging Face's own."""
    found = run(
        "generate", "--hf-model", hf, "--prompt", "w5 w7", "--prompt", "w5 w7", "--chat",
        "--system", "w8", "--max-new-tokens", "6",
    )  # fmt: skip
    text = words(expected["w1 w8 w2 w5 w7 w3"])
    assert (found.code, found.out) == (0, f"--- --prompt 1\n{text}\n--- --prompt 2\n{text}\n")


def test_a_text_ends_at_an_end_of_the_list(
    run: Run, hf: Path, expected: dict[str, list[int]]
) -> None:
    """generation_config.json names several; the one that ended it is among the tokens."""
    file = hf / "generation_config.json"
    before = file.read_bytes()
    text = expected["w5 w7"]
    try:
        file.write_text(json.dumps({"eos_token_id": [520, text[3]]}))
        found = run(
            "generate", "--hf-model", hf, "--prompt", "w5 w7", "--json", "--dtype", "float32"
        )
    finally:
        file.write_bytes(before)
    told = json.loads(found.out)
    stop = text.index(text[3]) + 1
    assert (told["token_ids"], told["finish_reason"]) == (text[:stop], "stop")


@pytest.mark.cluster
def test_torchruns_processes_are_the_ranks(megatron: Path, expected: dict[str, list[int]]) -> None:
    """The first of them speaks, of a mistake too."""

    def torchrun(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 - our own
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", "-m", "harness", "generate",
                "--megatron-path", str(megatron), "--prompt", "w5 w7",
                "--max-new-tokens", "6", *flags,
            ],
            capture_output=True, text=True, timeout=250, check=False, cwd=ROOT,
        )  # fmt: skip

    found = torchrun("--pp", "2")
    assert (found.returncode, found.stdout) == (0, words(expected["w5 w7"]) + "\n"), found.stderr
    assert found.stderr.count("6 tokens in ") == 1
    found = torchrun()
    assert (found.returncode, found.stdout) == (1, "")  # torchrun's own code
    assert found.stderr.count("BR200 torchrun has started 2 ranks for layout tp1-pp1") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "BR001 there is no prompt"),
        (["--prompt", ""], "BR001 the prompt is empty"),
        (["--prompt", "w1", "--system", "w2"], "BR001 --system is for chats"),
        (["--prompt", "w1", "--top-p", "0.9"], "BR001 greedy decoding has no use for"),
        (["--prompt", "w1", "--temperature", "1", "--top-p", "2"], "BR001 tokens cannot be"),
        (["--prompt", "w1", "--timeout", "inf"], "BR001 --timeout inf is not"),
        (["--prompt", "w1", "--timeout", "1e15"], "BR001 --timeout 1e+15 is not"),
        (["--prompt", "w1", "--tp", "3"], "BR201 tensor_model_parallel_size=3"),
        (["--prompt", "w1", "--max-new-tokens", "131072"], "--> --prompt 1: 1 tokens and"),
        (["--prompt", "w1", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["--prompts", "/nowhere/prompts.txt"], "BR001 cannot read the prompts"),
        (["--prompt", "w1", "--megatron-path", "/nowhere"], "/nowhere"),
        (["--prompt", "w1", "--megatron-path", "file:///nowhere"], "--> /nowhere\n"),
        (
            ["--prompt", "w1", "--megatron-path", "s3://x/y"],
            "BR001 a Megatron checkpoint behind a URL cannot be run\n  --> s3://x/y",
        ),
        (["--prompt", "w1", "--layers", "te"], "BR500 Transformer Engine layers need"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Run, hf: Path, flags: list[str], said: str) -> None:
    """One error, nothing on stdout, no traceback."""
    found = run("generate", "--hf-model", hf, *flags)
    assert found.code == (3 if "BR500" in said else 2)
    assert said in found.err
    assert "Traceback" not in found.err
    assert found.out == ""


def test_a_model_that_cannot_speak_is_refused(run: Run, tmp_path: Path) -> None:
    """No tokenizer, no chat template, no weights, no model; token ids need no tokenizer."""
    path = tmp_path / "hf"
    write_checkpoint(toy_named("super-49b-v1"), path, dtype="bfloat16")
    ask = ("--prompt", "w1", "--max-new-tokens", "2")
    found = run("generate", "--hf-model", path, *ask, "--chat")
    assert (found.code, found.err[:37]) == (2, "BR001 the chat template cannot write ")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    found = run("generate", "--hf-model", path, *ask)
    assert (found.code, found.err[:30]) == (2, "BR300 there is no tokenizer, a")
    (tmp_path / "ids.jsonl").write_text('{"token_ids": [1, 2]}')
    found = run(
        "generate", "--hf-model", path, "--prompts", tmp_path / "ids.jsonl",
        "--max-new-tokens", "2",
    )  # fmt: skip
    assert found.code == 0
    assert len([int(one) for one in found.out.split()]) == 2
    assert run("generate", *ask).err.startswith("BR001 no model")
    found = run("generate", "--hf-model", path / "config.json", *ask)
    assert found.err.startswith("BR001 a configuration alone")


def test_a_revision_is_of_a_model_on_the_hub(run: Run, hf: Path, megatron: Path) -> None:
    """Where none is named, nobody would look for it."""
    ask = ("generate", "--prompt", "w1", "--revision", "main", "--megatron-path", megatron)
    for flags, said in (((), "and none is named"), (("--hf-model", hf), "and this one is here")):
        found = run(*ask, *flags)
        assert (found.code, found.out) == (2, "")
        assert found.err.startswith(f"BR001 --revision is for models on the Hub, {said}")


def test_the_python_of_the_documentation_runs(
    hf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, beside a checkpoint named hf."""
    page = (ROOT / "docs" / "generation.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "hf").symlink_to(hf)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "generation.md", "exec"), {})  # noqa: S102 - our own documentation
    assert re.fullmatch(r"\[\(\d+(, \d+)+\), \(\d+(, \d+)+\)\]\n", capsys.readouterr().out)
