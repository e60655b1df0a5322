"""`AutoBridge` has Megatron-Bridge's calls, and takes or refuses what they are given."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import bridge.decilm  # noqa: F401 - registers the model type
from bridge import AutoBridge
from bridge.convert import import_checkpoint
from bridge.errors import (
    CheckpointError,
    ConfigError,
    TargetExistsError,
    UnsupportedArchitectureError,
    UsageError,
)
from bridge.manifest_check import check_manifest
from harness.toys import toy_named, write_checkpoint
from tests.directories import files_of

# Parameter names and defaults of megatron.bridge.AutoBridge 0.3.1, written down from its source;
# those behind the bar came with 0.6.2.
UPSTREAM = {
    "from_hf_pretrained": "path **kwargs",
    "from_hf_config": "config",
    "from_auto_config": "| megatron_path hf_model_id trust_remote_code=False",
    "supports": "config",
    "can_handle": "path trust_remote_code=False",
    "list_supported_models": "",
    "load_hf_weights": "self model hf_path=None allowed_mismatched_params=None",
    "export_hf_weights": "self model cpu=False show_progress=True conversion_tasks=None "
    "merge_adapter_weights=True | weight_dtype=None",
    "save_hf_pretrained": "self model path show_progress=True source_path=None strict=True "
    "merge_adapter_weights=True | distributed_save=False save_every_n_ranks=1 weight_dtype=None",
    "save_hf_weights": "self model path show_progress=True strict=True merge_adapter_weights=True "
    "| distributed_save=False save_every_n_ranks=1 weight_dtype=None",
    "save_megatron_model": "self model path hf_tokenizer_path=None low_memory_save=False "
    "hf_tokenizer_kwargs=None",
    "load_megatron_model": "self path mp_overrides=None **kwargs",
    "import_ckpt": "hf_model_id megatron_path **kwargs",
    "export_ckpt": "self megatron_path hf_path show_progress=True strict=False source_path=None",
    "to_megatron_model": "self load_weights=True hf_path=None **kwargs",
    "to_megatron_provider": "self load_weights=True hf_path=None",
    "get_hf_model_id_from_checkpoint": "path",
    "get_conversion_tasks": "self megatron_model hf_path=None",
}
CLASS_METHODS = {
    "from_hf_pretrained", "from_hf_config", "from_auto_config", "supports", "can_handle",
    "list_supported_models", "import_ckpt",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama and a DeciLM on this machine, and the first of them as Megatron has it."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("nano-4b", "super-49b-v1"):
        write_checkpoint(toy_named(name), folder / name, dtype="bfloat16")
    import_checkpoint(folder / "nano-4b", folder / "megatron")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", UPSTREAM)
def test_a_call_takes_what_megatron_bridge_s_does(name: str) -> None:
    """By position and by name, with the same defaults; what is ours comes by name alone."""
    function = inspect.getattr_static(AutoBridge, name)
    kind = classmethod if name in CLASS_METHODS else object
    assert isinstance(function, kind)
    assert isinstance(function, staticmethod) == (name == "get_hf_model_id_from_checkpoint")
    found = inspect.signature(getattr(AutoBridge, name)).parameters.values()
    theirs = []
    for parameter in found:
        text = f"**{parameter.name}" if parameter.kind is parameter.VAR_KEYWORD else parameter.name
        if parameter.default is not parameter.empty:
            text += f"={parameter.default!r}"
        theirs.append(text)
    wanted = [word for word in UPSTREAM[name].split() if word != "|"]
    ours = [word for word in theirs if word not in wanted]
    assert [word for word in theirs if word in wanted] == wanted
    by_name = {one.name for one in found if one.kind is one.KEYWORD_ONLY}
    assert {word.partition("=")[0] for word in ours} <= by_name


@pytest.mark.parametrize(
    "name",
    [
        "export_adapter_weights", "save_hf_adapter", "export_adapter_ckpt", "push_to_hub",
        "export_hf_weights_modelopt", "export_hf_weights_quant", "mla_transformer_config",
    ],
)  # fmt: skip
def test_a_call_that_is_not_here_says_why(models: dict[str, Path], name: str) -> None:
    """To `hasattr` it is absent; an unknown name is an ordinary mistake."""
    found = AutoBridge.from_hf_pretrained(models["nano-4b"])
    assert not hasattr(found, name)
    with pytest.raises(UsageError, match=f"AutoBridge.{name} is not supported: "):
        getattr(found, name)
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'") as caught:
        found.frobnicate  # noqa: B018 - the access is the test
    assert not isinstance(caught.value, UsageError)


@pytest.mark.parametrize("name", ["nano-4b", "super-49b-v1"])
def test_every_form_of_a_configuration_is_the_same_model(
    models: dict[str, Path], name: str
) -> None:
    """A directory, what transformers makes of it, and the parsed file."""
    config = AutoConfig.from_pretrained(models[name])
    parsed = json.loads((models[name] / "config.json").read_text())
    expected = AutoBridge.from_hf_pretrained(models[name]).spec
    assert AutoBridge.from_hf_config(config).spec == expected
    assert AutoBridge.from_hf_config(parsed).spec == expected
    found = AutoBridge.from_hf_pretrained(models[name]).hf_pretrained.config
    assert (type(found), found.vocab_size) == (type(config), config.vocab_size)
    assert AutoBridge.supports(config)
    assert AutoBridge.can_handle(models[name])
    transformer_config = AutoBridge.from_hf_config(config).transformer_config
    assert transformer_config.num_layers == config.num_hidden_layers


def test_what_is_not_of_the_family_is_neither_supported_nor_taken(tmp_path: Path) -> None:
    """Nor is a model of the family with a field that means something else."""
    assert AutoBridge.list_supported_models() == ["DeciLMForCausalLM", "LlamaForCausalLM"]
    other = toy_named("nano-4b").config_for("bfloat16") | {"architectures": ["GPT2LMHeadModel"]}
    odd = toy_named("nano-4b").config_for("bfloat16") | {"sliding_window_pattern": 6}
    for config in (other, odd, {}, None, object()):
        assert not AutoBridge.supports(config)
        with pytest.raises(ConfigError):
            AutoBridge.from_hf_config(config)
    (tmp_path / "config.json").write_text(json.dumps(other))
    assert not AutoBridge.can_handle(tmp_path)
    with pytest.raises(UnsupportedArchitectureError):
        AutoBridge.from_hf_pretrained(tmp_path)
    assert not AutoBridge.can_handle(tmp_path / "nowhere", trust_remote_code=True)
    for name in ("a--b/c", "org/model.git", "x" * 5000, "o/" + "x" * 5000, "\0", "no://where"):
        assert not AutoBridge.can_handle(name)


def test_arguments_of_from_hf_pretrained_are_honoured_or_refused(models: dict[str, Path]) -> None:
    """The dtype is what models compute in; where a Hugging Face model would lie is no matter."""
    hf = models["nano-4b"]
    found = AutoBridge.from_hf_pretrained(
        hf, torch_dtype=torch.float16, device_map="auto", attn_implementation="eager"
    )
    assert found.to_megatron_provider().params_dtype == torch.float16
    assert AutoBridge.from_hf_pretrained(hf, dtype="auto").spec.params_dtype == "bfloat16"
    with pytest.raises(UsageError, match="say different things"):
        AutoBridge.from_hf_pretrained(hf, dtype="float32", torch_dtype=torch.float16)
    with pytest.raises(UsageError, match="tensor_model_parallel_size=None: an integer"):
        found.load_megatron_model(hf, mp_overrides={"tensor_model_parallel_size": None})
    with pytest.raises(UsageError, match="would ignore these arguments") as caught:
        AutoBridge.from_hf_pretrained(hf, quantization_config={}, subfolder="x")
    assert caught.value.where == ("quantization_config", "subfolder")
    with pytest.raises(UsageError, match="compute in floating-point numbers"):
        AutoBridge.from_hf_pretrained(hf, torch_dtype=torch.int8)
    with pytest.raises(UsageError, match="on the Hub, and this one is here"):
        AutoBridge.from_hf_pretrained(hf, revision="main")


def test_a_configuration_alone_has_no_weights(models: dict[str, Path]) -> None:
    """It says so when they are asked for, not later; another checkpoint may give them."""
    config = AutoConfig.from_pretrained(models["nano-4b"])
    found = AutoBridge.from_hf_config(config)
    with pytest.raises(UsageError, match="knows no weights") as caught:
        found.to_megatron_provider()
    assert "load_weights=False" in str(caught.value.hint)
    assert found.to_megatron_provider(load_weights=False).load is None
    provider = found.to_megatron_provider(hf_path=models["nano-4b"])
    assert provider.load is not None
    assert provider.hf_model_id == str(models["nano-4b"])
    with pytest.raises(CheckpointError):
        found.to_megatron_provider(hf_path=models["nano-4b"] / "nowhere")


def test_a_checkpoint_s_own_args_make_a_configuration(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """What they say wins over the reference, which gives the rest; and it can be exported with."""
    reference = tmp_path / "reference"
    reference.mkdir()
    config = json.loads((models["nano-4b"] / "config.json").read_text())
    changed = config | {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "vocab_size": 7,
        "eos_token_id": 6,
        "rms_norm_eps": 1e-6,
        "dtype": "float16",  # the same field as torch_dtype, in the words of transformers 5
    }
    del changed["torch_dtype"]
    (reference / "config.json").write_text(json.dumps(changed))
    (reference / "tokenizer.json").write_text("{}")
    found = AutoBridge.from_auto_config(models["megatron"], str(reference))
    assert found.spec == AutoBridge.from_hf_pretrained(models["nano-4b"]).spec
    assert found.hf_pretrained.raw_config["eos_token_id"] == 6
    assert found.hf_model_id == str(reference)
    with pytest.raises(UsageError, match="knows no weights"):
        found.to_megatron_provider()
    found.export_ckpt(models["megatron"], tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written.get(name) for name in changed | config} == config | {
        "eos_token_id": 6,
        "dtype": None,
    }
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert sorted(Path(name).suffix for name in files_of(tmp_path / "out")) == [
        ".json", ".json", ".safetensors",
    ]  # fmt: skip
    other = AutoBridge.from_auto_config
    with pytest.raises(CheckpointError):
        other(tmp_path / "nowhere", str(reference))


def test_an_export_is_the_source_or_has_what_the_bridge_has(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """The same side files: the source again, file by file; others, and what is added: those."""
    hf = models["nano-4b"]
    same = AutoBridge.from_hf_pretrained(hf)
    same.export_ckpt(megatron_path=models["megatron"] / "iter_0000000", hf_path=tmp_path / "same")
    assert files_of(tmp_path / "same") == files_of(hf)
    other = tmp_path / "other"
    other.mkdir()
    config = (hf / "config.json").read_bytes()
    (other / "config.json").write_bytes(config)
    (other / "tokenizer.json").write_text('{"another": 1}')
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "config.json").write_text("not read")
    (extra / "modeling_custom.py").write_text("print()")
    AutoBridge.from_hf_pretrained(other).export_ckpt(
        models["megatron"], tmp_path / "mine", source_path=extra
    )
    small = {name: one for name, one in files_of(tmp_path / "mine").items() if "model." not in name}
    assert small == {
        "config.json": config,
        "tokenizer.json": b'{"another": 1}',
        "modeling_custom.py": b"print()",
    }
    assert check_manifest(tmp_path / "mine").differences == []
    with pytest.raises(TargetExistsError):
        same.export_ckpt(models["megatron"], tmp_path / "mine")
    same.export_ckpt(models["megatron"], tmp_path / "mine", overwrite=True)
    assert files_of(tmp_path / "mine") == files_of(hf)
    wrong = AutoBridge.from_hf_pretrained(models["super-49b-v1"])
    with pytest.raises(ConfigError):
        wrong.export_ckpt(models["megatron"], tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("hf", "target", "source_path"),
    [
        ("hf", "hf", None),
        ("hf", ".", None),
        ("hf", "hf/new", None),
        ("hf", "hf", "side"),
        ("hf", "side", "side"),
        ("another", "another", None),
    ],
)
def test_an_export_never_replaces_what_it_takes_files_from(
    models: dict[str, Path], tmp_path: Path, hf: str, target: str, source_path: str | None
) -> None:
    """Even where the Megatron checkpoint keeps them all, or they are put together elsewhere."""
    for name in ("hf", "another", "side"):
        shutil.copytree(models["nano-4b"], tmp_path / name)
    (tmp_path / "another" / "tokenizer.json").write_text('{"another": 1}')
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match="must not be one inside the other"):
        AutoBridge.from_hf_pretrained(tmp_path / hf).export_ckpt(
            models["megatron"],
            tmp_path / target,
            source_path=None if source_path is None else tmp_path / source_path,
            overwrite=True,
        )
    assert files_of(tmp_path) == before


def test_an_import_changes_no_dtype(models: dict[str, Path], tmp_path: Path) -> None:
    """Asked to, it says where that is done."""
    with pytest.raises(UsageError, match="an import changes no dtype") as caught:
        AutoBridge.import_ckpt(models["nano-4b"], tmp_path / "out", torch_dtype=torch.float32)
    assert "params_dtype" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []
    other = AutoBridge.from_hf_pretrained(models["nano-4b"], dtype="float32")
    with pytest.raises(UsageError, match="an export changes no dtype") as caught:
        other.export_ckpt(models["megatron"], tmp_path / "hf")
    assert "--dtype" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []
    AutoBridge.import_ckpt(models["nano-4b"], tmp_path / "out", torch_dtype=torch.bfloat16)
    assert files_of(tmp_path / "out") == files_of(models["megatron"])


@pytest.mark.parametrize(
    ("run_config", "expected"),
    [
        (None, None),
        ("model:\n  hf_model_id: org/theirs\n", "org/theirs"),
        ("model: {}\n", None),
        ("[]\n", CheckpointError),
        ("model: {\n", CheckpointError),
    ],
)
def test_the_id_of_a_checkpoint_s_source(
    models: dict[str, Path], tmp_path: Path, run_config: str | None, expected: Any
) -> None:
    """None where it was a path; of a checkpoint of Megatron-Bridge what its run says."""
    iteration = tmp_path / "iter_0000005"
    iteration.mkdir()
    (iteration / "metadata.json").write_bytes(
        (models["megatron"] / "iter_0000000" / "metadata.json").read_bytes()
    )
    if run_config is not None:
        (iteration / "run_config.yaml").write_text(run_config)
    if expected is CheckpointError:
        with pytest.raises(CheckpointError, match="not a run's configuration"):
            AutoBridge.get_hf_model_id_from_checkpoint(iteration)
    else:
        assert AutoBridge.get_hf_model_id_from_checkpoint(iteration) == expected
    assert AutoBridge.get_hf_model_id_from_checkpoint(models["megatron"]) is None
