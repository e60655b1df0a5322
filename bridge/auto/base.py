"""The part of `AutoBridge` that comes before any live model: what it is made from, its provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from bridge.auto.source import HfPretrained, config_of_checkpoint, plain_config
from bridge.dtypes import dtype_named
from bridge.errors import BridgeError, UsageError
from bridge.hf_config import MODEL_TYPES, spec_from_hf_config
from bridge.hub import HubAccess
from bridge.spec import ModelSpec, ParallelLayout

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from bridge.auto.provider import ModelProvider

_HUB_OPTIONS: Final = frozenset(HubAccess.__dataclass_fields__)
_MOOT: Final = frozenset({"attn_implementation", "device_map", "low_cpu_mem_usage"})
"""Of from_pretrained: how a Hugging Face model is placed and computes, and none is built here."""


class ModelBridge:
    """Constructors, and the way to a provider.

    Args:
        hf_pretrained: What `from_hf_pretrained` and `from_hf_config` find.
        params_dtype: What models are to hold and compute in; None is the configuration's.
        hf_model_id: What to call the model where `hf_pretrained` has no name.
    """

    def __init__(
        self,
        hf_pretrained: HfPretrained,
        *,
        params_dtype: str | None = None,
        hf_model_id: str | None = None,
    ) -> None:
        self.hf_pretrained = hf_pretrained
        self.hf_model_id = hf_pretrained.model_name_or_path or hf_model_id
        spec = hf_pretrained.spec()
        self.spec: ModelSpec = replace(spec, params_dtype=params_dtype or spec.params_dtype)

    @classmethod
    def list_supported_models(cls) -> list[str]:
        """The architectures this bridge converts."""
        return sorted(MODEL_TYPES)

    @classmethod
    def supports(cls, config: Any) -> bool:
        """Whether a configuration is of a model that the bridge converts, every field of it."""
        try:
            spec_from_hf_config(plain_config(config))
        except BridgeError:
            return False
        return True

    @classmethod
    def can_handle(cls, path: str | Path, trust_remote_code: bool = False) -> bool:
        """Whether `from_hf_pretrained` takes what is at a path, URL or Hub id."""
        try:
            cls.from_hf_pretrained(path, trust_remote_code=trust_remote_code)
        except BridgeError:
            return False
        return True

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, **kwargs: Any) -> Self:
        """Take a checkpoint: a directory, a URL that fsspec knows, or a Hub id.

        Only its configuration is read, and of the Hub nothing big is downloaded; weights are read
        when a model is filled, slice by slice, and no Hugging Face model is ever built.

        Args:
            path: Where it is.
            **kwargs: `trust_remote_code`, which nothing here needs; `torch_dtype` or `dtype`, what
                models are to compute in; `revision`, `cache_dir`, `token`, `local_files_only` and
                `force_download` as the Hub takes them. How a Hugging Face model is placed
                (`device_map` and the like) has no meaning here and is let pass.

        Raises:
            CheckpointError: BR300, it is not there.
            ConfigError: BR1xx, not a model that the bridge can honour.
            UsageError: BR001, other arguments, or a dtype that models cannot compute in.
        """
        trust_remote_code = bool(kwargs.pop("trust_remote_code", False))
        dtypes = [kwargs.pop(name, None) for name in ("torch_dtype", "dtype")]
        access = HubAccess(**{name: kwargs.pop(name) for name in _HUB_OPTIONS & kwargs.keys()})
        unknown = sorted(kwargs.keys() - _MOOT)
        if unknown:
            raise UsageError(
                "from_hf_pretrained would ignore these arguments",
                where=unknown,
                hint=f"it takes {', '.join(sorted(_HUB_OPTIONS | {'dtype', 'trust_remote_code'}))}",
            )
        wanted = [dtype_named(str(one)) for one in dtypes if one not in (None, "auto")]
        if len(set(wanted)) > 1:
            raise UsageError(
                "torch_dtype and dtype are one argument and say different things",
                where=[one.name for one in wanted],
                hint="give one of them",
            )
        odd = [f"dtype={one.name}" for one in wanted if not one.is_floating]
        if odd:
            raise UsageError(
                "models compute in floating-point numbers", where=odd,
                hint="choose bfloat16, float16 or float32",
            )  # fmt: skip
        pretrained = HfPretrained.of_checkpoint(
            str(path), access, trust_remote_code=trust_remote_code
        )
        return cls(pretrained, params_dtype=wanted[0].name if wanted else None)

    @classmethod
    def from_hf_config(cls, config: Any) -> Self:
        """Take a configuration alone: models get random weights, or those of an `hf_path`.

        Raises:
            ConfigError: BR1xx, not one of a model that the bridge can honour.
        """
        found = HfPretrained(
            model_name_or_path=None, raw_config=plain_config(config), has_weights=False
        )
        return cls(found, hf_model_id=getattr(config, "name_or_path", None) or None)

    @classmethod
    def from_auto_config(
        cls,
        megatron_path: str | Path,
        hf_model_id: str | Path,
        trust_remote_code: bool = False,
    ) -> Self:
        """Take the configuration that a Megatron checkpoint's own `args` describe.

        Args:
            megatron_path: Checkpoint root or iteration directory.
            hf_model_id: Model whose configuration and tokenizer fill in what args do not say; its
                weights are not read.
            trust_remote_code: As `from_hf_pretrained` takes it.

        Raises:
            CheckpointError: BR300, no checkpoint there.
            ConfigError: BR1xx, it holds no args, or those of another architecture.
        """
        reference = HfPretrained.of_checkpoint(
            str(hf_model_id), HubAccess(), trust_remote_code=trust_remote_code, has_weights=False
        )
        config = config_of_checkpoint(str(megatron_path), reference)
        return cls(replace(reference, raw_config=config))

    def to_megatron_provider(
        self,
        load_weights: bool = True,
        hf_path: str | Path | None = None,
    ) -> ModelProvider:
        """A provider whose layout and dtype can be set before it builds the model.

        Args:
            load_weights: Fill it from the checkpoint; otherwise its weights are random.
            hf_path: Another checkpoint of the same model to fill it from.

        Raises:
            UsageError: BR001, no weights to load.
        """
        from bridge.auto.weights import fill

        if not load_weights:
            return self._provider(None)
        source = self._weights(hf_path)

        def load(parts: list[Any], layout: ParallelLayout) -> None:
            fill(parts, self.spec, layout, source)

        provider = self._provider(load)
        provider.hf_model_id = source.model_name_or_path
        return provider

    def _provider(self, load: Callable[[list[Any], ParallelLayout], None] | None) -> ModelProvider:
        import torch

        from bridge.auto.provider import ModelProvider

        provider = ModelProvider(
            spec=self.spec,
            load=load,
            params_dtype=getattr(torch, self.spec.params_dtype),
            seq_length=self.spec.max_position_embeddings,
            hf_model_id=self.hf_model_id,
        )
        std = self.hf_pretrained.raw_config.get("initializer_range")
        if isinstance(std, int | float):
            provider.init_method_std = float(std)
        return provider

    def _weights(self, hf_path: str | Path | None) -> HfPretrained:
        if hf_path is not None:
            ours = self.hf_pretrained
            access = replace(ours.access, revision=None)  # of the bridge's own checkpoint
            return HfPretrained.of_checkpoint(
                str(hf_path), access, trust_remote_code=ours.trust_remote_code
            )
        if not self.hf_pretrained.has_weights:
            self.hf_pretrained.location(weights=True)  # says what to do
        return self.hf_pretrained

    def to_megatron_model(
        self,
        load_weights: bool = True,
        hf_path: str | Path | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """`to_megatron_provider`, then its `provide_distributed_model(**kwargs)`."""
        return self.to_megatron_provider(load_weights, hf_path).provide_distributed_model(**kwargs)

    @property
    def transformer_config(self) -> TransformerConfig:
        """Megatron-Core's configuration of the model on one rank."""
        from bridge.megatron_config import transformer_config
        from bridge.pipeline import plan_layout

        layout = plan_layout(self.spec)
        return transformer_config(self.spec, layout, params_dtype=self.spec.params_dtype)
