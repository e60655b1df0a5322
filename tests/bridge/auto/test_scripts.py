"""Scripts written for Megatron-Bridge run here once their import says `bridge`.

Each is what its documentation shows, run as a user would: by `python` or by torchrun, without a
`__main__` guard, in an empty directory.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file

from bridge.convert import export_checkpoint, import_checkpoint
from harness.toys import toy_named, write_checkpoint

pytestmark = pytest.mark.ranks

Script: TypeAlias = Callable[..., str]
StartHub: TypeAlias = Callable[[Path], Any]
"""That of `conftest`, which no test can import."""

PROMPT = [3, 141, 59, 26, 5]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints on this machine."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("nano-4b", "super-49b-v1"):
        write_checkpoint(toy_named(name), folder / name, dtype="float32")
    return {path.name: path for path in folder.iterdir()}


def same_files(left: Path, right: Path) -> bool:
    """Whether two flat directories hold the same bytes."""
    names = {path.name for path in (*left.iterdir(), *right.iterdir())}
    return filecmp.cmpfiles(left, right, names, shallow=False)[1:] == ([], [])


def tensors(directory: Path) -> dict[str, bytes]:
    """What safetensors itself reads, float32 bit by bit."""
    return {
        name: tensor.numpy().tobytes()
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def greedy(directory: Path) -> list[int]:
    """What transformers' model says next, token by token, without a cache."""
    from transformers import AutoModelForCausalLM

    import bridge.decilm  # noqa: F401 - registers the model type

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            following = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
    return tokens[0].tolist()


def test_a_model_is_loaded_over_two_tensor_parallel_ranks(
    models: dict[str, Path], tmp_path: Path, script: Script
) -> None:
    """By torchrun, which the provider joins by itself; the model is saved again, too."""
    hf = models["super-49b-v1"]
    out = script(
        f"""
        from bridge import AutoBridge

        bridge = AutoBridge.from_hf_pretrained({str(hf)!r}, trust_remote_code=True)
        provider = bridge.to_megatron_provider()
        provider.tensor_model_parallel_size = 2
        provider.finalize()
        model = provider.provide_distributed_model(wrap_with_ddp=False)

        print(type(model).__name__, model[0].config.tensor_model_parallel_size, flush=True)
        for name, weight in bridge.export_hf_weights(model, cpu=True, show_progress=False):
            if name == "model.layers.0.mlp.gate_proj.weight":
                print(list(weight.shape), flush=True)
        bridge.save_hf_pretrained(model, "./hf_exports/super")
        """,
        ranks=2,
    )
    width = json.loads((hf / "config.json").read_text())["hidden_size"]
    shapes, kinds = sorted(out.splitlines())[:2], sorted(out.splitlines())[2:]
    assert [json.loads(shape)[1] for shape in shapes] == [width] * 2
    assert kinds == ["list 2"] * 2
    assert same_files(hf, tmp_path / "hf_exports" / "super")


def test_an_iteration_is_exported_and_a_model_of_the_hub_imported(
    models: dict[str, Path], tmp_path: Path, script: Script, hub: StartHub
) -> None:
    """By id; the export of a training run's iteration downloads no weights."""
    hf = models["nano-4b"]
    started = hub(hf)
    import_checkpoint(hf, tmp_path / "imported")
    (tmp_path / "checkpoints" / "run").mkdir(parents=True)
    (tmp_path / "imported" / "iter_0000000").rename(
        tmp_path / "checkpoints" / "run" / "iter_0000500"
    )
    out = script(
        """
        from pathlib import Path

        from bridge import AutoBridge

        bridge = AutoBridge.from_hf_pretrained("org/model", trust_remote_code=True)
        bridge.export_ckpt(
            megatron_path="./checkpoints/run/iter_0000500", hf_path="./hf_exports/x"
        )
        print(len(list(Path("cache").rglob("*.safetensors"))))

        AutoBridge.import_ckpt("org/model", "./checkpoints/x")
        print(AutoBridge.get_hf_model_id_from_checkpoint("./checkpoints/x"))
        """,
        HF_ENDPOINT=started.url,
        HF_HOME="cache",
    )
    assert out == "0\norg/model\n"
    # Our own cut into files, for the source's is in the weights that were not downloaded.
    assert tensors(tmp_path / "hf_exports" / "x") == tensors(hf)
    side = [path.name for path in hf.iterdir() if "safetensors" not in path.name]
    assert filecmp.cmpfiles(hf, tmp_path / "hf_exports" / "x", side, shallow=False)[0] == side
    # Each file was fetched once, whatever it was for.
    assert sorted(started.transferred) == sorted(path.name for path in hf.iterdir())
    export_checkpoint(tmp_path / "checkpoints" / "x", tmp_path / "back")
    assert same_files(hf, tmp_path / "back")


def test_a_converted_model_generates(
    models: dict[str, Path], tmp_path: Path, script: Script
) -> None:
    """Greedy decoding by Megatron's own forward step, as transformers' model decodes."""
    import_checkpoint(models["super-49b-v1"], tmp_path / "megatron")
    out = script(
        f"""
        import torch
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from bridge import AutoBridge


        class SingleBatchIterator:
            def __init__(self, input_ids, position_ids):
                self.batch = dict(tokens=input_ids, position_ids=position_ids)
                self._yielded = False

            def __iter__(self):
                return self

            def __next__(self):
                if self._yielded:
                    raise StopIteration
                self._yielded = True
                return self.batch


        def text_forward_step(data_iterator, model, **kwargs):
            batch = next(data_iterator)

            def loss_func(x, **kwargs):
                return x

            return model(
                input_ids=batch["tokens"],
                position_ids=batch["position_ids"],
                attention_mask=batch.get("attention_mask", None),
            ), loss_func


        bridge = AutoBridge.from_hf_pretrained({str(models["super-49b-v1"])!r})
        model_provider = bridge.to_megatron_provider(load_weights=False)
        model_provider.tensor_model_parallel_size = 1
        model_provider.pipeline_model_parallel_size = 1
        model_provider.expert_model_parallel_size = 1
        model_provider.expert_tensor_parallel_size = 1
        model_provider.pipeline_dtype = torch.float32
        model_provider.initialize_model_parallel(seed=0)
        model = bridge.load_megatron_model(
            "./megatron",
            mp_overrides={{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}},
            wrap_with_ddp=False,
        )
        for m in model:
            m.eval()

        generated_ids = torch.tensor([{PROMPT}])
        for step in range({NEW_TOKENS}):
            with torch.no_grad():
                position_ids = torch.arange(generated_ids.size(1)).unsqueeze(0)
                output = get_forward_backward_func()(
                    forward_step_func=text_forward_step,
                    data_iterator=SingleBatchIterator(generated_ids, position_ids),
                    model=model,
                    num_microbatches=1,
                    forward_only=True,
                    seq_length=generated_ids.size(1),
                    micro_batch_size=1,
                    collect_non_loss_data=True,
                )
                output = output[0]
                assert parallel_state.is_pipeline_last_stage()
                next_token_ids = torch.argmax(output[:, -1], dim=-1, keepdim=True)
                generated_ids = torch.cat([generated_ids, next_token_ids], dim=-1)
        print(generated_ids[0].tolist())
        """
    )
    assert out == f"{greedy(models['super-49b-v1'])}\n"
