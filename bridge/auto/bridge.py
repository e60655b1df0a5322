"""`AutoBridge`, the front door for code that was written for Megatron-Bridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NoReturn

from bridge.auto.live import LiveBridge
from bridge.errors import UsageError

_MISSING: Final = {
    "export_adapter_ckpt": "adapters are not converted",
    "export_adapter_weights": "adapters are not converted",
    "export_hf_weights_modelopt": "quantised weights are not exported",
    "export_hf_weights_quant": "quantised weights are not exported",
    "mla_transformer_config": "no model of the family has latent attention",
    "push_to_hub": "it does nothing in Megatron-Bridge either: use `hf upload`",
    "save_hf_adapter": "adapters are not converted",
}


class _MissingCallError(UsageError, AttributeError):
    """A call of Megatron-Bridge's that is not here, for `hasattr` too."""


class AutoBridge(LiveBridge):
    """One model between Hugging Face and Megatron-Core.

    Names, parameters and results are those of `megatron.bridge.AutoBridge`; `docs/migration.md`
    lists each call, and where this one is stricter. Start with `from_hf_pretrained`.
    """

    def load_megatron_model(
        self,
        path: str | Path,
        *,
        mp_overrides: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Build this rank's model parts and fill them from a Megatron checkpoint.

        Args:
            path: Checkpoint root or iteration directory, or a URL of either; cut for any layout.
            mp_overrides: Attributes of the provider, such as `tensor_model_parallel_size`. What it
                does not say is as Megatron-Core's groups are formed, or 1.
            **kwargs: Of `provide_distributed_model`; `wrap_with_ddp` is False unless given.

        Raises:
            CheckpointError: BR300, no checkpoint there.
            InconsistentConfigError: BR104, it is of another model than the bridge.
            AccountingError: BR301, parameters missing or of another shape.
        """
        from bridge.auto.checkpoints import load
        from bridge.auto.groups import groups_formed
        from bridge.spec import ParallelLayout

        def fill(parts: list[Any], layout: ParallelLayout) -> None:
            load(parts, self.spec, layout, path)

        provider = self._provider(fill)
        for name, value in (groups_formed() | (mp_overrides or {})).items():
            setattr(provider, name, value)
        return provider.provide_distributed_model(**{"wrap_with_ddp": False, **kwargs})

    @classmethod
    def import_ckpt(
        cls,
        hf_model_id: str | Path,
        megatron_path: str | Path,
        *,
        show_progress: bool = True,
        overwrite: bool = False,
        **kwargs: Any,
    ) -> None:
        """Convert a Hugging Face checkpoint to Megatron's, file to file; no model is built.

        Under torchrun every rank makes the call, and they share the work.

        Args:
            hf_model_id: As `from_hf_pretrained` takes it.
            megatron_path: Directory or URL to create.
            show_progress: Show it, on rank 0, where stderr is a terminal.
            overwrite: Replace an existing directory, once the new one is complete.
            **kwargs: Of `from_hf_pretrained`. The dtype is the source's: no bit changes.

        Raises:
            TargetExistsError: BR304, the directory is there and not empty.
            UsageError: BR001, a dtype that the source does not have.
            BridgeError: As `bridge.import_checkpoint`.
        """
        from bridge.auto.checkpoints import import_

        import_(
            lambda: cls.from_hf_pretrained(hf_model_id, **kwargs), megatron_path,
            show_progress=show_progress, overwrite=overwrite,
        )  # fmt: skip

    def export_ckpt(
        self,
        megatron_path: str | Path,
        hf_path: str | Path,
        show_progress: bool = True,
        strict: bool = False,
        source_path: str | Path | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Convert a Megatron checkpoint to a Hugging Face directory, file to file.

        No weights of the bridge's own checkpoint are read or downloaded. Under torchrun every rank
        makes the call, and they share the work.

        Args:
            megatron_path: Checkpoint root or iteration directory, or a URL of either.
            hf_path: Directory or URL to create.
            show_progress: Show it, on rank 0, where stderr is a terminal.
            strict: Nothing is ever left out, whatever this says.
            source_path: Directory whose files are added, where the source has none of that name.
            overwrite: Replace an existing directory, once the new one is complete.

        Raises:
            TargetExistsError: BR304, the directory is there and not empty.
            UsageError: BR001, a directory that the bridge's own checkpoint or `source_path` is,
                holds or lies in; or a dtype that was asked for and is not the source's.
            BridgeError: As `bridge.export_checkpoint`.
        """
        del strict
        from bridge.auto.checkpoints import export

        export(
            self, megatron_path, hf_path,
            source_path=source_path, show_progress=show_progress, overwrite=overwrite,
        )  # fmt: skip

    @staticmethod
    def get_hf_model_id_from_checkpoint(path: str | Path) -> str | None:
        """The Hub id that a Megatron checkpoint was imported from, None where it is not known.

        Args:
            path: Checkpoint root or iteration directory, this bridge's or Megatron-Bridge's.

        Raises:
            CheckpointError: BR300, no checkpoint there.
        """
        from bridge.auto.checkpoints import hf_model_id_of

        return hf_model_id_of(path)

    def __getattr__(self, name: str) -> NoReturn:
        """Say why a call of Megatron-Bridge's is not here."""
        if name in _MISSING:
            raise _MissingCallError(f"AutoBridge.{name} is not supported: {_MISSING[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hf_pretrained.where!r})"
