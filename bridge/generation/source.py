"""Where a model that is to speak comes from: its weights, its configuration, its tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bridge.agreement import described_model
from bridge.errors import UsageError
from bridge.hf_config import config_file, load_hf_config, spec_from_hf_config
from bridge.hub import resolve_here
from bridge.parameters import hf_tensors
from bridge.plan import Plan, account_for
from bridge.progress import Advance
from bridge.spec import ModelSpec, ParallelLayout
from bridge.storage.megatron import MegatronSource
from bridge.storage.safetensors import SafetensorsSource

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that has been looked at and can be loaded. Picklable: ranks load it themselves.

    Args:
        spec: What it is.
        kind: Format of the weights.
        path: Where they are.
        directory: Where tokenizer and generation_config.json would be; None where nobody knows.
        config: Its config.json; empty where there is none.
        itemsize: Bytes of an element as it is stored, of most of them.
    """

    spec: ModelSpec
    kind: Literal["hf", "megatron"]
    path: Path
    directory: Path | None
    config: Mapping[str, Any]
    itemsize: int

    def load(
        self, model_parts: Sequence[GPTModel], layout: ParallelLayout, *, advance: Advance
    ) -> None:
        """Fill this rank's parameters; see `bridge.live_parameters`."""
        from bridge.live_parameters import load_hf, load_megatron

        if self.kind == "hf":
            with SafetensorsSource(self.path) as hf:
                load_hf(model_parts, self.spec, layout, hf, advance=advance)
        else:
            with MegatronSource(self.path) as megatron:
                load_megatron(model_parts, self.spec, layout, megatron, advance=advance)


def find_model(
    hf_model: str | None,
    megatron_path: Path | None,
    *,
    revision: str | None = None,
    carry: Collection[str] = (),
) -> ModelSource:
    """Look at a model and account for its weights; none of them is read yet.

    Args:
        hf_model: Directory, URL or Hub id. With a Megatron checkpoint only its configuration and
            tokenizer are wanted.
        megatron_path: A Megatron checkpoint, whose weights are then the model's. One that was
            imported has kept configuration and tokenizer.
        revision: Branch, tag or commit on the Hub.
        carry: Unknown fields of the configuration to let through.

    Raises:
        UsageError: BR001, neither is given, a configuration without weights, or a revision of
            what is here.
        ConfigError: BR1xx, a configuration that the bridge cannot honour, or of another model.
        CheckpointError: BR3xx, no such checkpoint, or its tensors are not those of the model.
    """
    found = None
    if hf_model is not None:
        found = resolve_here(hf_model, weights=megatron_path is None, revision=revision)
    elif revision is not None:
        raise UsageError(
            "--revision is for models on the Hub, and none is named",
            hint="give --hf-model with its id, or leave --revision away",
        )
    if megatron_path is not None:
        with MegatronSource(megatron_path) as megatron:
            spec, described = described_model(megatron, found, carry=carry)
            plan = Plan.of_checkpoint(spec, megatron.tensors)
            account_for(plan.mcore_shapes, megatron.tensors, where=str(megatron_path))
            return ModelSource(
                spec=spec,
                kind="megatron",
                path=megatron_path.absolute(),
                directory=_directory(described),
                config={} if described is None else load_hf_config(described),
                itemsize=next(iter(megatron.tensors.values())).dtype.itemsize,
            )
    if found is None:
        raise UsageError("no model", hint="give --hf-model or --megatron-path")
    if not found.is_dir():
        raise UsageError(
            "a configuration alone has nothing to compute with",
            where=str(found),
            hint="give the checkpoint's directory, its weights are needed too",
        )
    config = load_hf_config(found)
    spec = spec_from_hf_config(config, where=str(config_file(found)), carry=carry)
    with SafetensorsSource(found) as hf:
        account_for(hf_tensors(spec), hf.tensors, where=str(found))
        itemsize = next(iter(hf.tensors.values())).dtype.itemsize
    return ModelSource(
        spec=spec,
        kind="hf",
        path=found.absolute(),
        directory=_directory(found),
        config=config,
        itemsize=itemsize,
    )


def _directory(described: Any) -> Path | None:  # noqa: ANN401 - a Path, see below
    """Of a directory or its bare config.json."""
    if not isinstance(described, Path):  # of a local checkpoint it always is one
        return None
    return described.absolute() if described.is_dir() else described.absolute().parent
