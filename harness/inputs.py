"""What a user gives to the verifying commands, looked at before anything is computed.

Input that cannot be used is an error with a code and exit code 2, never a case that failed.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from bridge.convert import read_spec
from bridge.errors import CheckpointError
from bridge.parameters import hf_tensors
from bridge.plan import Plan, account_for
from bridge.spec import ModelSpec
from bridge.storage.megatron import MegatronSource
from bridge.storage.safetensors import SafetensorsSource


def account_for_hf(hf: Path, *, carry: Collection[str] = ()) -> ModelSpec:
    """Read a checkpoint's configuration and hold its weight files against it.

    Raises:
        ConfigError: BR1xx, a configuration the bridge cannot honour.
        CheckpointError: BR300, no weights there, or a file of them is missing.
        CorruptFileError: BR302, a file that contradicts itself or the index.
        AccountingError: BR301, tensors that are not those of the configuration.
    """
    if not hf.is_dir():
        raise CheckpointError(
            "a configuration alone has nothing to compute with",
            where=str(hf),
            hint="give the checkpoint's directory, its weights are needed too",
        )
    spec = read_spec(hf, carry=carry)
    with SafetensorsSource(hf) as source:
        account_for(hf_tensors(spec), source.tensors, where=str(hf))
    return spec


def account_for_megatron(megatron: Path, spec: ModelSpec) -> None:
    """Hold the parameters of a Megatron checkpoint against a model.

    Raises:
        CheckpointError: BR300, no checkpoint there.
        CorruptFileError: BR302, files that contradict its metadata.
        AccountingError: BR301, parameters that are not the model's.
    """
    with MegatronSource(megatron) as source:
        plan = Plan.of_checkpoint(spec, source.tensors)
        account_for(plan.mcore_shapes, source.tensors, where=str(megatron))
