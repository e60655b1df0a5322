"""What an `AutoBridge` was made from: a checkpoint by path, URL or Hub id, or a configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from bridge.agreement import spec_of_args
from bridge.errors import CheckpointError, ConfigError, UsageError
from bridge.hf_config import (
    CONFIG_NAME,
    hf_config_from_spec,
    load_hf_config,
    spec_from_hf_config,
)
from bridge.hf_fields import MAPPED
from bridge.hub import HubAccess, commit_of, is_hub_id, resolve_model
from bridge.live_save import HfFiles
from bridge.scratch import held_directory
from bridge.spec import ModelSpec
from bridge.storage.megatron import MegatronSource
from bridge.storage.remote import Location, parse_location
from bridge.storage.safetensors import INDEX_NAME, SafetensorsSource
from bridge.storage.target import read_small_file, side_files

# Stated by a checkpoint's args; all else of a configuration is its publisher's.
_OF_THE_MODEL: Final = MAPPED | {"model_type"}


@dataclass(slots=True, kw_only=True)
class HfPretrained:
    """A Hugging Face checkpoint, or its configuration alone. Weights are found when needed.

    What Megatron-Bridge calls `hf_pretrained`. No Hugging Face model is ever built.

    Args:
        model_name_or_path: As the user gave it; None of a configuration that has no name.
        raw_config: The parsed `config.json`.
        has_weights: Whether weights are meant to be there.
        access: How the Hub is asked, the commit pinned once it is known.
        trust_remote_code: As the user gave it. Nothing here runs a checkpoint's own code.
    """

    model_name_or_path: str | None
    raw_config: Mapping[str, Any]
    has_weights: bool = True
    access: HubAccess = field(default_factory=HubAccess)
    trust_remote_code: bool = False

    @classmethod
    def of_checkpoint(
        cls, path: str, access: HubAccess, *, trust_remote_code: bool, has_weights: bool = True
    ) -> HfPretrained:
        """Find a checkpoint and read its configuration; of the Hub nothing big is downloaded.

        Raises:
            CheckpointError: BR300, it is not there.
            ConfigError: BR100, it has no configuration.
        """
        location = resolve_model(path, weights=False, access=access)
        commit = commit_of(location) if is_hub_id(path) else None
        if commit is not None:  # weights are taken later, and must be of the same commit
            access = replace(access, revision=commit)
        return cls(
            model_name_or_path=path,
            raw_config=load_hf_config(location),
            has_weights=has_weights,
            access=access,
            trust_remote_code=trust_remote_code,
        )

    @property
    def config(self) -> Any:
        """The configuration as transformers has it, with this bridge's DeciLM."""
        import transformers

        import bridge.decilm  # noqa: F401 - registers the model type

        values = dict(self.raw_config)
        return transformers.AutoConfig.for_model(values.pop("model_type"), **values)

    @property
    def where(self) -> str:
        """What to call it in errors."""
        return self.model_name_or_path or "the configuration"

    @property
    def hub_id(self) -> str | None:
        """Its id, where it comes from the Hub."""
        name = self.model_name_or_path
        return name if name is not None and is_hub_id(name) else None

    def spec(self) -> ModelSpec:
        """The model.

        Raises:
            ConfigError: BR1xx, not one that the bridge can honour.
        """
        return spec_from_hf_config(self.raw_config, where=self.where)

    def location(self, *, weights: bool) -> Location:
        """Where the checkpoint is, downloaded as far as is needed.

        Raises:
            UsageError: BR001, there is only a configuration.
            CheckpointError: BR300, it does not come.
        """
        if self.model_name_or_path is None or (weights and not self.has_weights):
            raise UsageError(
                "this bridge was made of a configuration and knows no weights",
                hint="pass load_weights=False for random ones, or hf_path with a checkpoint, or "
                "start from AutoBridge.from_hf_pretrained",
            )
        return resolve_model(self.model_name_or_path, weights=weights, access=self.access)

    def places(self, other: str | Path | None) -> list[Location]:
        """What an output takes files from, which its target must not be or hold.

        Args:
            other: A further directory that it takes files from.
        """
        found = [] if self.model_name_or_path is None else [self.location(weights=False)]
        return found if other is None else [*found, resolve_model(str(other), weights=False)]

    def files(self, extra: str | Path | None = None) -> HfFiles:
        """What a directory equal to the source holds, besides the tensors.

        Weights are not downloaded for it: where they are not here, their cut into files is unknown.

        Args:
            extra: Directory whose files are added, where the source has none of that name.
        """
        small: dict[str, bytes] = {}
        if extra is not None:
            small |= small_files(resolve_model(str(extra), weights=False))
        if self.model_name_or_path is not None:
            small |= small_files(self.location(weights=False))
        if not self.has_weights:
            small[CONFIG_NAME] = json.dumps(dict(self.raw_config), indent=2).encode() + b"\n"
            return HfFiles(small=small)
        try:
            access = replace(self.access, local_files_only=True, force_download=False)
            here = resolve_model(self.where, weights=True, access=access)
            with SafetensorsSource(here) as source:
                headers = list(source.headers.values())
        except CheckpointError:
            return HfFiles(small=small)
        index = here / INDEX_NAME
        return HfFiles(
            small=small,
            headers=headers,
            index=read_small_file(index) if index.is_file() else None,
        )

    @contextmanager
    def as_directory(self, extra: str | Path | None) -> Iterator[Location]:
        """A place with the configuration and the side files, for an export to take them from."""
        if self.has_weights and extra is None:
            yield self.location(weights=False)
            return
        with held_directory() as directory:
            for name, data in self.files(extra).small.items():
                path = directory / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            yield directory


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration as `config.json` would hold it.

    Args:
        config: A `PretrainedConfig`, or what `config.json` parses to.

    Raises:
        ConfigError: BR100, neither.
    """
    found = config if isinstance(config, Mapping) else None
    if hasattr(config, "to_json_string"):
        # Of `to_dict` the dtype is torch's and block configurations are objects; JSON has neither.
        found = json.loads(config.to_json_string(use_diff=False))
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"not a configuration: {type(config).__name__}",
            hint="give what AutoConfig.from_pretrained returns, or a parsed config.json",
        )
    return dict(found)


def config_of_checkpoint(megatron: str, reference: HfPretrained) -> dict[str, Any]:
    """The configuration of the model in a Megatron checkpoint, by the checkpoint's own `args`.

    Args:
        megatron: Checkpoint root or iteration directory.
        reference: Fills in what `args` do not say: token ids, `auto_map` and the like.

    Raises:
        CheckpointError: BR300, no checkpoint there.
        ConfigError: BR1xx, no `args`, or those of another architecture.
    """
    with MegatronSource(parse_location(megatron)) as source:
        spec = spec_of_args(source, reference.spec())
        if spec is None:
            raise ConfigError(
                "the checkpoint says nothing of its model: common.pt holds no args",
                where=str(source.directory),
                hint="use AutoBridge.from_hf_pretrained with the model it was trained from",
            )
    written = hf_config_from_spec(spec)
    kept = {name: one for name, one in reference.raw_config.items() if name not in _OF_THE_MODEL}
    found = kept | {
        name: one for name, one in written.items() if name in _OF_THE_MODEL or name not in kept
    }
    if spec_from_hf_config(found, where="the configuration of the args") != spec:
        raise ConfigError(
            "what the reference adds contradicts the checkpoint's args",
            where=reference.where,
            hint="choose a reference of the same family",
        )
    return found


def small_files(directory: Location) -> dict[str, bytes]:
    """What a checkpoint directory holds besides weights, or a bare configuration, by name."""
    if not directory.is_dir():
        return {CONFIG_NAME: read_small_file(directory)}
    return {name: read_small_file(directory / name) for name in side_files(directory)[0]}
