"""What ranks do with live models of `AutoBridge`; a module, because ranks import it by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bridge import AutoBridge, hashing, live_save, platform
from bridge.errors import BridgeError
from bridge.forward import forward
from bridge.live_layout import bare_parts, layout_of
from bridge.manifest import FileEntry, Files
from bridge.storage.new_checkpoint import NewDirectory
from harness.ranks import RankContext

INPUT_IDS = torch.arange(3, 25).reshape(2, 11)
Digests = list[tuple[str, str, tuple[int, ...], str]]


def digest(name: str, tensor: torch.Tensor) -> tuple[str, str, tuple[int, ...], str]:
    """Name, dtype, shape and sha256 of the bits."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return name, str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(data).hexdigest()


def provided(hf: Path, settings: dict[str, Any]) -> tuple[AutoBridge, list[Any]]:
    """A bridge and its model, built as a user would."""
    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider()
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    return bridge, provider.provide_distributed_model(wrap_with_ddp=False)


def stream(_context: RankContext, hf: Path, settings: dict[str, Any]) -> dict[str, Digests]:
    """What this rank gets when all do, when the last one does, and of some tasks."""
    bridge, model = provided(hf, settings)
    last = torch.distributed.get_world_size() - 1
    tasks = [
        task
        for task in bridge.get_conversion_tasks(model)
        if task.global_param_name.endswith(("linear_qkv.weight", "final_layernorm.weight"))
    ]
    halves = bridge.export_hf_weights(model, conversion_tasks=tasks, weight_dtype=torch.float16)
    return {
        "all": [digest(*one) for one in bridge.export_hf_weights(model, show_progress=False)],
        "last": [digest(*one) for one in bridge.export_hf_weights(model, cpu=True, dst=last)],
        "tasks": [digest(*one) for one in halves],
    }


def tasks_of(_context: RankContext, hf: Path, settings: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The tasks, and the sizes of the shards that are here."""
    bridge, model = provided(hf, settings)
    return [
        (
            task.global_param_name,
            task.mapping.hf_param,
            task.pp_rank,
            task.vp_stage,
            None if task.param_weight is None else tuple(task.param_weight.shape),
        )
        for task in bridge.get_conversion_tasks(model)
    ]


def save(_context: RankContext, hf: Path, settings: dict[str, Any], out: Path) -> bool:
    """Both directories; whether what is loaded from Megatron's is what was saved."""
    bridge, model = provided(hf, settings)
    bridge.save_hf_pretrained(model, out / "hf", show_progress=False)
    bridge.save_hf_weights(model, out / "weights")
    bridge.save_hf_pretrained(model, out / "wide", weight_dtype=torch.float64)
    bridge.save_megatron_model(model, out / "megatron", low_memory_save=True)
    overrides = {name: one for name, one in settings.items() if name != "should_pad_vocab"}
    again = bridge.load_megatron_model(out / "megatron", mp_overrides=overrides)
    before, after = ([*_named(parts)] for parts in (model, again))
    return [name for name, _ in before] == [name for name, _ in after] and all(
        torch.equal(one[: other.shape[0]], other)
        for (_, one), (_, other) in zip(before, after, strict=True)
    )


def _named(model: list[Any]) -> list[tuple[str, torch.Tensor]]:
    return [
        (f"{number}.{name}", tensor)
        for number, part in enumerate(bare_parts(model))
        for name, tensor in part.named_parameters()
    ]


def refusals(_context: RankContext, hf: Path, other: Path, more: Path, out: Path) -> dict[str, str]:
    """Errors that one rank alone sees, as every rank tells them."""
    settings = {"pipeline_model_parallel_size": 2}
    bridge, model = provided(hf, settings)
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    found = {}

    def note(what: str, function: Any, *args: Any) -> None:
        try:
            function(*args)
        except BridgeError as error:
            found[what] = str(error)

    note("target", bridge.save_hf_pretrained, model, more)
    note("megatron target", bridge.save_megatron_model, model, more)
    for what, save in (
        ("hf", bridge.save_hf_pretrained),
        ("weights", bridge.save_hf_weights),
        ("megatron", bridge.save_megatron_model),
    ):
        note(f"{what} over the source", partial(save, overwrite=True), model, hf)
        note(f"{what} around the source", partial(save, overwrite=True), model, hf.parent)
        note(f"{what} in the source", save, model, hf / "new")
        note(f"{what} to a URL", save, model, "nowhere://bucket/new")
    over: dict[str, Any] = {"path": more, "overwrite": True}
    note("over the side files", partial(bridge.save_hf_pretrained, source_path=more, **over), model)
    note(
        "over the tokenizer",
        partial(bridge.save_megatron_model, hf_tokenizer_path=more, **over),
        model,
    )
    nowhere = more / "nowhere"
    note("no side files", partial(bridge.save_hf_pretrained, source_path=nowhere), model, out)
    note("no tokenizer", partial(bridge.save_megatron_model, hf_tokenizer_path=nowhere), model, out)
    here = nowhere if last else hf
    note("import on some ranks", AutoBridge.import_ckpt, here, out)
    note("weights on some ranks", bridge.load_hf_weights, model, here)
    note("no target", bridge.save_hf_pretrained, model, None)
    note("no megatron target", bridge.save_megatron_model, model, None)
    note("no size", partial(bridge.save_hf_weights, max_shard_size=0), model, out)
    no_task: Any = ["x"]
    note("no task", partial(bridge.export_hf_weights, conversion_tasks=no_task), model)
    note("no rank", partial(bridge.export_hf_weights, dst=2), model)
    note("integers", partial(bridge.export_hf_weights, weight_dtype=torch.int8), model)
    note("integers saved", partial(bridge.save_hf_weights, weight_dtype=torch.int8), model, out)
    note("other weights", bridge.load_hf_weights, model, other)
    note("one more tensor", bridge.load_hf_weights, model, more)
    note("mismatches", bridge.load_hf_weights, model, None, ["decoder.*"])
    note("no source", AutoBridge.from_hf_config(bridge.hf_pretrained.config).load_hf_weights, model)
    note("no model on some ranks", bridge.get_conversion_tasks, torch.nn.ReLU() if last else model)
    if last:
        layer = bare_parts(model)[0].decoder.layers[1]
        with torch.no_grad():
            layer.mlp.linear_fc2.weight[0, 0] = 1e6
    if last:
        config = bare_parts(model)[0].config
        kept, config.layernorm_epsilon = config.layernorm_epsilon, 0.5
    note("other constants", bridge.save_hf_pretrained, model, out)
    note("other constants in megatron", bridge.save_megatron_model, model, out)
    note("other constants to fill", bridge.load_hf_weights, model)
    if last:
        config.layernorm_epsilon = kept
    _note_other_frequencies(note, bridge, model, hf, out)
    _note_damage(note, bridge, model, out)
    half: dict[str, Any] = {"weight_dtype": torch.float16}
    note("overflow", lambda: list(bridge.export_hf_weights(model, **half)))
    note("overflow saved", partial(bridge.save_hf_weights, **half), model, out)
    if last:
        layer.register_parameter("lora", torch.nn.Parameter(torch.zeros(3)))
    note("adapter", lambda: list(bridge.export_hf_weights(model)))
    note("adapter saved", bridge.save_hf_pretrained, model, out / "adapter")
    note("adapter in megatron", bridge.save_megatron_model, model, out / "adapter-megatron")
    return found


def _note_damage(
    note: Callable[..., None], bridge: AutoBridge, model: list[Any], out: Path
) -> None:
    """Where a bit that is no tensor's turns in the first file that rank 0 writes."""
    hash_files, write_files = hashing.hash_files, NewDirectory.write_files

    def flip(path: Path) -> None:
        if torch.distributed.get_rank() == 0:
            data = bytearray(path.read_bytes())
            data[12] ^= 1
            path.write_bytes(data)

    def hashed(directory: Path, files: Files, **how: Any) -> dict[str, FileEntry]:
        flip(directory / next(iter(files)))
        return hash_files(directory, files, **how)

    def written(new: NewDirectory, layouts: Any, *args: Any, **how: Any) -> Files:
        found = write_files(new, layouts, *args, **how)
        flip(new.place / layouts[0].path)
        return found

    with (
        patch.object(live_save, "hash_files", hashed),
        patch.object(NewDirectory, "write_files", written),
    ):
        note("damaged", bridge.save_hf_pretrained, model, out)
        note("damaged megatron", bridge.save_megatron_model, model, out)


def _note_other_frequencies(
    note: Callable[..., None], bridge: AutoBridge, model: list[Any], hf: Path, out: Path
) -> None:
    """What a bridge whose model has another RoPE factor says of this one."""
    raw = bridge.hf_pretrained.raw_config
    scaling = raw["rope_scaling"] | {"factor": 2 * raw["rope_scaling"]["factor"]}
    theirs = AutoBridge.from_hf_config({**raw, "rope_scaling": scaling})
    note("other frequencies", theirs.save_hf_pretrained, model, out)
    note("other frequencies in megatron", theirs.save_megatron_model, model, out)
    rank = torch.distributed.get_rank()
    scaled = out.parent / "scaled"
    if rank == 0:
        shutil.copytree(hf, scaled)
        (scaled / "config.json").write_text(json.dumps({**raw, "rope_scaling": scaling}))
    torch.distributed.barrier()
    note("other frequencies to fill", partial(theirs.load_hf_weights, hf_path=scaled), model)
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(scaled)


def schedule(_context: RankContext, hf: Path, settings: dict[str, Any]) -> bool | None:
    """Whether Megatron's own schedule gives `forward`'s logits, where it gives any."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    bridge, model = provided(hf, settings)
    batch = {
        "input_ids": INPUT_IDS,
        "position_ids": torch.arange(INPUT_IDS.shape[1]).expand_as(INPUT_IDS),
        "attention_mask": None,
    }

    def step(iterator: Any, part: Any) -> Any:
        return part(**next(iterator)), lambda output, **_: output

    with torch.no_grad():
        iterators = [iter([batch] * 2) for _ in model]
        output = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model,
            num_microbatches=2 if len(model) > 1 else 1,
            forward_only=True,
            seq_length=INPUT_IDS.shape[1],
            micro_batch_size=INPUT_IDS.shape[0],
            collect_non_loss_data=True,
        )
    parts = bare_parts(model)
    layout = layout_of(parts, bridge.spec)
    expected = forward([part.eval() for part in parts], bridge.spec, layout, INPUT_IDS)
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    shares = [torch.empty_like(output[0]) for _ in range(layout.tensor_model_parallel_size)]
    torch.distributed.all_gather(
        shares, output[0], group=parallel_state.get_tensor_model_parallel_group()
    )
    logits = torch.cat(shares, dim=-1)[..., : bridge.spec.vocab_size]
    return torch.equal(logits, expected.float())


def replicas(context: RankContext, hf: Path, out: Path, tokenizer: Path) -> dict[str, Any]:
    """Two data parallel replicas: each streams, the first saves, and they train together."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from bridge.backward import loss_and_gradients

    parallel_state.destroy_model_parallel()
    try:
        bridge, model = provided(hf, {})
        streams = [len(list(bridge.export_hf_weights(model, dst=dst))) for dst in (None, 0, 1)]
        bridge.save_megatron_model(model, out, hf_tokenizer_path=tokenizer)
        provider = bridge.to_megatron_provider()
        trained = provider.provide_distributed_model(
            ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        )
        mine = INPUT_IDS[context.rank : context.rank + 1]
        labels = mine.roll(-1, dims=1)

        def step(_iterator: Any, part: Any) -> Any:
            positions = torch.arange(mine.shape[1])[None]
            losses = part(
                input_ids=mine, position_ids=positions, attention_mask=None, labels=labels
            )
            return losses, lambda output: (output[:, :-1].mean(), {})

        trained[0].zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=trained,
            num_microbatches=1,
            seq_length=mine.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
        finalize_model_grads(trained)
        parts = bare_parts(model)
        loss_and_gradients(parts, bridge.spec, layout_of(parts, bridge.spec), INPUT_IDS)
        pairs: Any = zip(_named(trained), _named(model), strict=True)
        worst = max(
            float((one.main_grad - other.grad).norm() / other.grad.norm())
            for (_, one), (_, other) in pairs
        )
        return {"streams": streams, "gradients": worst}
    finally:
        parallel_state.destroy_model_parallel()
        platform.form_groups(context.layout)


def built(_context: RankContext, hf: Path) -> dict[str, Any]:
    """What comes of a provider's settings on two tensor parallel ranks."""
    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = 2
    provider.sequence_parallel = True
    provider.should_pad_vocab = True
    provider.params_dtype = torch.float32
    provider.init_method_std = 0.05
    provider.hidden_dropout = 0.1
    provider.recompute_granularity = "full"
    provider.recompute_method = "uniform"
    provider.recompute_num_layers = 1
    hooks: list[str] = []

    def note(what: str) -> Any:
        return lambda _model: hooks.append(what)

    provider.register_pre_wrap_hook(note("second"))
    provider.register_pre_wrap_hook(lambda model: [note("third")(model), model][1])
    provider.register_pre_wrap_hook(note("first"), prepend=True)
    provider.register_post_wrap_hook(note("wrapped"))
    (part,) = provider.provide_distributed_model(wrap_with_ddp=False)
    found: dict[str, Any] = {
        "config": {
            name: getattr(part.config, name)
            for name in (
                "recompute_granularity",
                "hidden_dropout",
                "params_dtype",
                "sequence_parallel",
                "perform_initialization",
            )
        },
        "hooks": hooks,
        "training": [part.training],
        "rows": part.embedding.word_embeddings.weight.shape[0],
        # Not of a layer that ends a residual branch: those Megatron scales.
        "std": float(part.decoder.layers[2].mlp.linear_fc1.weight.std()),
        "ones": bool((part.decoder.final_layernorm.weight == 1).all()),
    }
    halves = bridge.to_megatron_provider()
    halves.tensor_model_parallel_size = 2
    bare: dict[str, Any] = {"mixed_precision_wrapper": None}
    found["halves"] = [
        type(halves.provide_distributed_model(wrap_with_ddp=False, **arguments)[0]).__name__
        for arguments in ({}, bare)
    ]
    found["provided"] = type(halves.provide(pre_process=True)).__name__
    refused: dict[str, Callable[[], Any]] = {
        "other groups": lambda: bridge.to_megatron_model(wrap_with_ddp=False),
        "post_process": lambda: halves.provide(post_process=False),
        "vp_stage": lambda: halves.provide(vp_stage=3),
        "handed on": lambda: odd.provide_distributed_model(wrap_with_ddp=False),
    }
    odd = bridge.to_megatron_provider(load_weights=False)
    odd.tensor_model_parallel_size = 2
    odd.recompute_granularity = "foo"
    for what, function in refused.items():
        try:
            function()
        except BridgeError as error:
            found[what] = str(error)
    return found
