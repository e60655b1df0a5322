"""A model about to be built: its layout and dtype can be set, then it is provided, rank by rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, TypeAlias

import torch

from bridge.auto import groups
from bridge.auto.fields import HANDED_ON, check_fixed, check_settings, value_of
from bridge.auto.wrapping import prepare_part, wrap
from bridge.dtypes import dtype_named
from bridge.errors import LayoutError, PipelineParallelError, UsageError
from bridge.megatron_config import AttentionBackend, Layers
from bridge.model import build_model
from bridge.pipeline import plan_layout
from bridge.spec import ModelSpec, ParallelLayout

Hook: TypeAlias = Callable[[list[Any]], list[Any] | None]
Load: TypeAlias = Callable[[list[Any], ParallelLayout], None]
"""Fills bare model parts."""

_HALVES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FLOAT16_MODULE: Final = object()
"""Stands for Megatron's `Float16Module`, which is not to be imported for a default."""


@dataclass(kw_only=True)
class ModelProvider:
    """What Megatron-Bridge's `GPTModelProvider` is to its users: settings, then the model.

    Every attribute has a fate (`bridge.auto.fields`): one that would change nothing, or something
    that the bridge cannot do, is refused when it is set.

    Args:
        spec: The model.
        load: Fills it; None draws random weights.
        tensor_model_parallel_size: TP.
        pipeline_model_parallel_size: PP.
        virtual_pipeline_model_parallel_size: Model parts per pipeline rank; None without
            interleaving.
        sequence_parallel: Shard activations along the sequence outside the TP regions.
        num_layers_in_first_pipeline_stage: Layers of the first pipeline rank; the others share the
            rest evenly.
        num_layers_in_last_pipeline_stage: Layers of the last one.
        num_layers_per_stage: Layers of every stage, in the model's order; None chooses them.
        should_pad_vocab: Pad the vocabulary to `make_vocab_size_divisible_by` x TP, not just TP.
        make_vocab_size_divisible_by: See there.
        params_dtype: What the model holds and computes in; `bf16` and `fp16` say the same.
        pipeline_dtype: That of what stages send; None, or the same.
        seq_length: For the caller's own use: the model takes any length.
        use_cpu_initialization: Build it on the CPU even where there is a GPU.
        layers: Megatron-Core's own or Transformer Engine's; "auto" takes the latter where it can.
        attention_backend: Of Transformer Engine's layers.
        hf_model_id: What the weights came from.
    """

    spec: ModelSpec
    load: Load | None = None
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    num_layers_per_stage: Sequence[int] | None = None
    should_pad_vocab: bool = False
    make_vocab_size_divisible_by: int = 128
    params_dtype: torch.dtype = torch.bfloat16
    pipeline_dtype: torch.dtype | None = None
    seq_length: int = 1024
    use_cpu_initialization: bool = False
    layers: Layers | Literal["auto"] = "auto"
    attention_backend: AttentionBackend = "auto"
    hf_model_id: str | None = None
    _handed_on: dict[str, object] = field(default_factory=dict, init=False, repr=False)
    _pre_wrap_hooks: list[Hook] = field(default_factory=list, init=False, repr=False)
    _post_wrap_hooks: list[Hook] = field(default_factory=list, init=False, repr=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Take what is honoured, and refuse the rest by name."""
        if name in _HALVES:
            self._set_half(_HALVES[name], on=bool(value))
        elif name in HANDED_ON:
            self._handed_on[name] = value
        elif name in _OWN:
            object.__setattr__(
                self, name, getattr(value, "name", value) if name in _NAMED else value
            )
        else:
            check_fixed(name, value, self.spec, _OWN)

    def __getattr__(self, name: str) -> Any:
        """What is not set reads as what it is in the model, or by default."""
        if name.startswith("_"):
            raise AttributeError(name)
        if name in _HALVES:
            return self.params_dtype == _HALVES[name]
        if name in self._handed_on:
            return self._handed_on[name]
        return value_of(name, self.spec)

    def _set_half(self, half: torch.dtype, *, on: bool) -> None:
        if on:
            self.params_dtype = half
        elif self.params_dtype == half:
            self.params_dtype = torch.float32

    def finalize(self) -> None:
        """See that the settings fit the model and one another; building does it again.

        Raises:
            LayoutError: BR200 to BR202, a layout that the model cannot be cut into.
            UsageError: BR001, settings that contradict one another, or that nothing can have.
        """
        self.layout()
        if self.pipeline_dtype not in (None, self.params_dtype):
            raise UsageError(
                f"pipeline_dtype={self.pipeline_dtype} with params_dtype={self.params_dtype}",
                where="provider.pipeline_dtype",
                hint="stages send what they compute: leave it None, or set both alike",
            )

    def layout(self) -> ParallelLayout:
        """How the model will be cut. Raises as `finalize` does."""
        check_settings(self)
        return plan_layout(
            self.spec,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=self.virtual_pipeline_model_parallel_size,
            num_layers_per_stage=self._stages(),
            sequence_parallel=self.sequence_parallel,
            make_vocab_size_divisible_by=(
                self.make_vocab_size_divisible_by if self.should_pad_vocab else 1
            ),
        )

    def _stages(self) -> Sequence[int] | None:
        first = self.num_layers_in_first_pipeline_stage
        last = self.num_layers_in_last_pipeline_stage
        if first is None and last is None:
            return self.num_layers_per_stage
        ends = (first is not None) + (last is not None)
        middle = self.pipeline_model_parallel_size - ends
        rest = self.spec.num_layers - (first or 0) - (last or 0)
        even = rest // middle if middle > 0 and rest % middle == 0 else None
        if (
            self.num_layers_per_stage is not None
            or self.virtual_pipeline_model_parallel_size not in (None, 1)
            or (even is None and (middle, rest) != (0, 0))
        ):
            raise PipelineParallelError(
                f"num_layers_in_first_pipeline_stage={first} and "
                f"num_layers_in_last_pipeline_stage={last} leave {rest} layers for {middle} "
                "pipeline ranks",
                hint="set num_layers_per_stage instead, the layers of every stage",
            )
        stages = [even or 0] * middle
        return [*([] if first is None else [first]), *stages, *([] if last is None else [last])]

    def initialize_model_parallel(
        self,
        seed: int | None = None,
        seed_kwargs: dict[str, Any] | None = None,
        **model_parallel_kwargs: object,
    ) -> None:
        """Join the ranks and form Megatron-Core's groups for these settings.

        Args:
            seed: Of torch's generator and Megatron's; None leaves torch's alone.
            seed_kwargs: Refused: Megatron's generators are in their inference form here.
            **model_parallel_kwargs: Further ones of `parallel_state.initialize_model_parallel`.

        Raises:
            LayoutError: BR200, the ranks do not fit, or groups are formed for another layout.
            UsageError: BR001, sizes, which are the provider's attributes.
        """
        sizes = [name for name in model_parallel_kwargs if name.endswith(("_size", "_sizes"))]
        if seed_kwargs or sizes:
            raise UsageError(
                f"initialize_model_parallel takes no {', '.join(sizes) or 'seed_kwargs'} here",
                hint="set sizes as attributes of the provider" if sizes else "leave it away",
            )
        device = groups.device_kind(use_cpu=self.use_cpu_initialization)
        groups.form(self.layout(), device, seed=seed, **model_parallel_kwargs)

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """Build one model part of this rank, its weights not loaded.

        Args:
            pre_process: Whether it holds the embedding; None, or what the layout says.
            post_process: Whether it holds the output layer; likewise.
            vp_stage: Which of the rank's parts.

        Raises:
            LayoutError: BR200, the layout says otherwise, has no such part, or groups are not
                formed.
        """
        from megatron.core import parallel_state

        layout = self.layout()
        if not parallel_state.is_initialized():
            raise LayoutError(
                "Megatron-Core's parallel groups are not formed in this process",
                hint="call the provider's initialize_model_parallel first",
            )
        stages = layout.stages_of(parallel_state.get_pipeline_model_parallel_rank())
        if vp_stage not in (None, *range(len(stages))):
            raise LayoutError(
                f"vp_stage={vp_stage} for layout {layout.name} of {len(stages)} parts per rank",
                hint=f"give one from 0 to {len(stages) - 1}, or None for the first",
            )
        stage = stages[vp_stage or 0]
        for name, asked in (("pre_process", pre_process), ("post_process", post_process)):
            if asked not in (None, getattr(stage, name)):
                raise LayoutError(
                    f"{name}={asked} for a stage of {layout.name} that has {getattr(stage, name)}",
                    hint="leave it None",
                )
        return self._build(layout, [vp_stage or 0])[0]

    def _build(self, layout: ParallelLayout, vp_stages: Sequence[int] | None) -> list[Any]:
        further = {"perform_initialization": self.load is None, **self._handed_on}
        device = groups.device_kind(use_cpu=self.use_cpu_initialization)
        parts = build_model(
            self.spec,
            layout,
            params_dtype=dtype_named(str(self.params_dtype)).name,
            layers=self.layers,
            attention_backend=self.attention_backend,
            device=device,
            further=further,
            vp_stages=vp_stages,
        )
        return [prepare_part(part) for part in parts]

    def provide_distributed_model(
        self,
        ddp_config: Any = None,
        model_type: Any = None,
        overlap_param_gather_with_optimizer_step: bool = False,
        fp16: bool | None = None,
        bf16: bool | None = None,
        use_megatron_fsdp: bool = False,
        use_torch_fsdp2: bool = False,
        wrap_with_ddp: bool = True,
        data_parallel_random_init: bool = True,
        use_cpu_initialization: bool | None = None,
        init_model_with_meta_device: bool | None = None,
        pre_wrap_hook: Hook | list[Hook] | None = None,
        post_wrap_hook: Hook | None = None,
        mixed_precision_wrapper: Any = _FLOAT16_MODULE,
        pg_collection: Any = None,
    ) -> list[Any]:
        """Build this rank's model parts, fill them and wrap them.

        Groups are formed first where they are not: of torchrun's ranks, or of this process alone.

        Args:
            ddp_config: Needed with `wrap_with_ddp`.
            model_type: None or `ModelType.encoder_or_decoder`.
            overlap_param_gather_with_optimizer_step: As Megatron's data parallelism takes it.
            fp16: Sets the provider's `fp16`.
            bf16: Sets the provider's `bf16`.
            use_megatron_fsdp: Refused.
            use_torch_fsdp2: Refused.
            wrap_with_ddp: Wrap in Megatron's `DistributedDataParallel`.
            data_parallel_random_init: Then give all replicas the first one's weights.
            use_cpu_initialization: Sets the provider's attribute of this name.
            init_model_with_meta_device: Refused.
            pre_wrap_hook: Instead of the registered ones; weights are loaded before either.
            post_wrap_hook: Instead of the registered ones.
            mixed_precision_wrapper: Around parts in half precision; None leaves them bare.
            pg_collection: Refused.

        Returns:
            One part per virtual stage, in training mode.

        Raises:
            UsageError: BR001, refused arguments.
            LayoutError: BR200 to BR202, as `finalize` and `initialize_model_parallel`.
            AccountingError: BR301, tensors missing from the checkpoint or of another shape.
        """
        _refuse(
            use_megatron_fsdp=use_megatron_fsdp,
            use_torch_fsdp2=use_torch_fsdp2,
            init_model_with_meta_device=init_model_with_meta_device,
            pg_collection=pg_collection,
            model_type=getattr(model_type, "name", None) not in (None, "encoder_or_decoder"),
        )
        if wrap_with_ddp and ddp_config is None:
            raise UsageError(
                "wrap_with_ddp needs a ddp_config",
                hint="pass wrap_with_ddp=False for a model that is not to be trained",
            )
        for name, value in (("fp16", fp16), ("bf16", bf16)):
            if value:
                setattr(self, name, value)
        if use_cpu_initialization is not None:
            self.use_cpu_initialization = use_cpu_initialization
        self.finalize()
        layout = self.layout()
        device = groups.device_kind(use_cpu=self.use_cpu_initialization)
        groups.form(layout, device, seed=0)
        parts = self._build(layout, None)
        if self.load is not None:
            self.load(parts, layout)
        before = pre_wrap_hook if pre_wrap_hook is not None else self._pre_wrap_hooks
        after = post_wrap_hook if post_wrap_hook is not None else self._post_wrap_hooks
        model = wrap(
            _through(before, parts),
            half=mixed_precision_wrapper,
            is_default=mixed_precision_wrapper is _FLOAT16_MODULE,
            ddp_config=ddp_config if wrap_with_ddp else None,
            overlap_param_gather=overlap_param_gather_with_optimizer_step,
            broadcast=data_parallel_random_init,
        )
        return _through(after, model)

    def register_pre_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        """Have a hook called with the filled parts; it may give others back."""
        self._pre_wrap_hooks.insert(0 if prepend else len(self._pre_wrap_hooks), hook)

    def register_post_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        """Have a hook called with the wrapped parts; it may give others back."""
        self._post_wrap_hooks.insert(0 if prepend else len(self._post_wrap_hooks), hook)


_OWN: Final = frozenset(one.name for one in fields(ModelProvider))
_NAMED: Final = frozenset({"attention_backend"})
"""Given as Megatron's enumeration or by its members' names."""


def _refuse(**asked: object) -> None:
    wrong = [name for name, value in asked.items() if value]
    if wrong:
        raise UsageError(
            "provide_distributed_model cannot do what is asked",
            where=wrong,
            hint="leave these arguments away; docs/migration.md says what the bridge can do",
        )


def _through(hooks: Hook | Sequence[Hook], model: list[Any]) -> list[Any]:
    for hook in [hooks] if callable(hooks) else hooks:
        changed = hook(model)
        model = model if changed is None else changed
    return model
