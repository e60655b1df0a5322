"""The part of `AutoBridge` that deals with live models: filling, streaming, saving them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.auto.base import ModelBridge
from bridge.convert import DEFAULT_MAX_SHARD_SIZE
from bridge.errors import UsageError

if TYPE_CHECKING:
    import torch

    from bridge.auto.tasks import ConversionTask
    from bridge.live_export import HFWeightTuple


class LiveBridge(ModelBridge):
    """Calls on live models. They are collective: every rank makes them."""

    def load_hf_weights(
        self,
        model: Any,
        hf_path: str | Path | None = None,
        allowed_mismatched_params: list[str] | None = None,
    ) -> Any:
        """Fill a live model in place from the bridge's checkpoint, or from another of its kind.

        Args:
            model: One model part or all of this rank's, wrapped or not.
            hf_path: The other checkpoint.
            allowed_mismatched_params: Refused: a weight that is not loaded is a wrong model.

        Returns:
            `model`.

        Raises:
            UsageError: BR001, no weights to load, or mismatches to be allowed.
            InconsistentConfigError: BR104, the checkpoint or the live model is of another model
                than the bridge, or computes with other constants.
            AccountingError: BR301, the checkpoint's tensors are not the model's.
        """
        from bridge.auto.weights import load_hf_weights

        if allowed_mismatched_params:
            raise UsageError(
                "parameters that do not match are not skipped",
                where=allowed_mismatched_params,
                hint="mend the checkpoint or its configuration; the error says what differs",
            )
        load_hf_weights(model, self.spec, lambda: self._weights(hf_path))
        return model

    def export_hf_weights(
        self,
        model: Any,
        cpu: bool = False,
        show_progress: bool = True,
        conversion_tasks: list[ConversionTask] | None = None,
        merge_adapter_weights: bool = True,
        weight_dtype: torch.dtype | None = None,
        *,
        dst: int | None = None,
    ) -> Iterator[HFWeightTuple]:
        """Stream a live model's tensors as (param_name, weight), gathered over TP and PP.

        Args:
            model: One model part or all of this rank's, wrapped or not.
            cpu: Give them in host memory.
            show_progress: Show it, on rank 0, where stderr is a terminal.
            conversion_tasks: Parameters wanted, as `get_conversion_tasks` lists them; None is all.
            merge_adapter_weights: There are no adapters to merge; a model with any is refused.
            weight_dtype: Round each element to this dtype, once.
            dst: Rank that gets the tensors; None gives them to all. The stream of the others is
                then empty, and has to be exhausted all the same.

        Raises:
            UsageError: BR001, no such rank, what is no task, or a dtype that holds no
                floating-point numbers.
            PlanError: BR400, the live model has parameters that are not the model's.
            DtypeMismatchError: BR303, finite elements would become infinite in `weight_dtype`.
        """
        del merge_adapter_weights
        from bridge.auto.weights import refuse_stream, stream_hf_weights

        refuse_stream(weight_dtype, dst)
        only = None
        if conversion_tasks is not None:
            only = set(map(_parameter_of, conversion_tasks))
        return stream_hf_weights(
            model, self.spec,
            cpu=cpu, show_progress=show_progress, only=only, weight_dtype=weight_dtype, dst=dst,
        )  # fmt: skip

    def get_conversion_tasks(
        self,
        megatron_model: Any,
        hf_path: str | Path | None = None,
    ) -> list[ConversionTask]:
        """What becomes of each parameter: a task per Megatron parameter of the whole model.

        Args:
            megatron_model: One model part or all of this rank's, wrapped or not.
            hf_path: Read by Megatron-Bridge; the tasks are the model's, whatever its weights.
        """
        del hf_path
        from bridge.auto.weights import tasks_of

        return tasks_of(megatron_model, self.spec)

    def save_hf_pretrained(
        self,
        model: Any,
        path: str | Path,
        show_progress: bool = True,
        source_path: str | Path | None = None,
        strict: bool = True,
        merge_adapter_weights: bool = True,
        distributed_save: bool = False,
        save_every_n_ranks: int = 1,
        weight_dtype: torch.dtype | None = None,
        *,
        overwrite: bool = False,
        max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    ) -> None:
        """Write a live model as a Hugging Face directory: weights, configuration, tokenizer, all.

        A model whose weights have not changed gives back the source directory, byte for byte.

        Args:
            model: One model part or all of this rank's, wrapped or not.
            path: Directory to create, of this machine; none that the source is, holds or lies in.
            show_progress: Show it, on rank 0, where stderr is a terminal.
            source_path: Directory whose files are added, where the source has none of that name.
            strict: Nothing is ever left out, whatever this says.
            merge_adapter_weights: There are no adapters to merge; a model with any is refused.
            distributed_save: Refused: rank 0 writes.
            save_every_n_ranks: Of that.
            weight_dtype: Round each element to this dtype, once.
            overwrite: Replace an existing directory, once the new one is complete.
            max_shard_size: Bytes per weight file, where the source's own division is not known.

        Raises:
            UsageError: BR001, such a directory, a URL, or a dtype of no floating-point numbers.
            DtypeMismatchError: BR303, finite elements would become infinite in `weight_dtype`.
            TargetExistsError: BR304, the directory is there and not empty.
            VerificationError: BR305, what was written, read back, differs; nothing is left of it.
        """
        del strict, merge_adapter_weights
        from bridge.auto.weights import save_hf

        _refuse_distributed(distributed_save, save_every_n_ranks)
        save_hf(
            model, self.spec, path, self.hf_pretrained, extra=source_path, only_weights=False,
            show_progress=show_progress, weight_dtype=weight_dtype, overwrite=overwrite,
            max_shard_size=max_shard_size,
        )  # fmt: skip

    def save_hf_weights(
        self,
        model: Any,
        path: str | Path,
        show_progress: bool = True,
        strict: bool = True,
        merge_adapter_weights: bool = True,
        distributed_save: bool = False,
        save_every_n_ranks: int = 1,
        weight_dtype: torch.dtype | None = None,
        *,
        overwrite: bool = False,
        max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    ) -> None:
        """Write a live model's weights and their index alone; see `save_hf_pretrained`."""
        del strict, merge_adapter_weights
        from bridge.auto.weights import save_hf

        _refuse_distributed(distributed_save, save_every_n_ranks)
        save_hf(
            model, self.spec, path, self.hf_pretrained, extra=None, only_weights=True,
            show_progress=show_progress, weight_dtype=weight_dtype, overwrite=overwrite,
            max_shard_size=max_shard_size,
        )  # fmt: skip

    def save_megatron_model(
        self,
        model: Any,
        path: str | Path,
        hf_tokenizer_path: str | Path | None = None,
        low_memory_save: bool = False,
        hf_tokenizer_kwargs: dict[str, Any] | None = None,
        *,
        show_progress: bool = True,
        overwrite: bool = False,
    ) -> None:
        """Write a live model as Megatron's `torch_dist`, in the form that an import has.

        Each rank writes its own shards; the result loads at any layout, here and in Megatron-LM,
        and exports to a directory like the source's.

        Args:
            model: One model part or all of this rank's, wrapped or not.
            path: Directory to create, seen by all ranks; none that the source or
                `hf_tokenizer_path` is, holds or lies in, and no URL.
            hf_tokenizer_path: Directory or Hub id whose files besides weights are kept with the
                checkpoint; None takes the bridge's own.
            low_memory_save: Memory is bounded either way; the model stays usable.
            hf_tokenizer_kwargs: No tokenizer is loaded, so there is nothing to pass them to.
            show_progress: Show it, on rank 0, where stderr is a terminal.
            overwrite: Replace an existing directory, once the new one is complete.

        Raises:
            UsageError: BR001, such a directory, or a URL.
            TargetExistsError: BR304, the directory is there and not empty.
            VerificationError: BR305, what was written, read back, differs; nothing is left of it.
        """
        del low_memory_save, hf_tokenizer_kwargs
        from bridge.auto.weights import save_megatron

        save_megatron(
            model, self.spec, path, self.hf_pretrained,
            tokenizer=hf_tokenizer_path, show_progress=show_progress, overwrite=overwrite,
        )  # fmt: skip


def _parameter_of(task: ConversionTask) -> str:
    name = getattr(task, "global_param_name", None)
    if not isinstance(name, str):
        raise UsageError(
            f"not a conversion task: {task!r:.80}",
            where="conversion_tasks",
            hint="give some of those that get_conversion_tasks returns",
        )
    return name


def _refuse_distributed(distributed_save: bool, save_every_n_ranks: int) -> None:
    if distributed_save or save_every_n_ranks != 1:
        raise UsageError(
            "Hugging Face files are written by rank 0 alone",
            where=f"distributed_save={distributed_save}, save_every_n_ranks={save_every_n_ranks}",
            hint="leave both away; save_megatron_model writes from every rank",
        )
