"""What a conversion tells besides its figures, and what it holds an export against."""

from __future__ import annotations

from collections.abc import Mapping

from bridge.casting import Loss, rounding_note
from bridge.dtypes import Dtype
from bridge.errors import ConfigError, CorruptFileError, VerificationError
from bridge.megatron_args import megatron_lm_flags
from bridge.plan import Plan, fold_layers
from bridge.record import RECORD_NAME, SourceRecord
from bridge.spec import ModelSpec
from bridge.storage.megatron import MegatronSource


def import_notes(spec: ModelSpec) -> list[str]:
    """With which flags Megatron-LM runs the model, or why it cannot."""
    try:
        flags = " ".join(megatron_lm_flags(spec))
    except ConfigError as error:
        return [f"{error.message}. {error.hint}"]
    return [
        "Megatron-LM: --load P --ckpt-format torch_dist --use-checkpoint-args --finetune " + flags
    ]


def exact_notes(asked: Dtype | None, dtype: Dtype | None) -> list[str]:
    """Of a dtype that was asked for and that all weights have already."""
    return [rounding_note(Loss(), asked, 0)] if asked is not None and dtype is None else []


def vocabulary_notes(source: MegatronSource, plan: Plan) -> list[str]:
    """Rows that are taken for padding by the configuration's word alone."""
    padded, size = plan.padded_vocab_size, plan.spec.vocab_size
    if padded == size or (source.args or {}).get("vocab_size") is not None:
        return []
    note = (
        f"vocab_size {size} is the configuration's, the checkpoint does not say it: the last "
        f"{padded - size} of {padded} rows were dropped as padding"
    )
    return [note]


def check_unchanged(record: SourceRecord, digests: Mapping[str, str]) -> list[str]:
    """Hold what was exported against what was imported, tensor by tensor, by its hash.

    Raises:
        CorruptFileError: BR302, the record lacks hashes of some.
        VerificationError: BR305, naming the tensors that are others.
    """
    if not digests:
        return []
    if not record.tensor_sha256:
        note = (
            f"{RECORD_NAME} holds no hashes, as of a live model or with --verify none: nothing "
            "tells whether these tensors are those that were imported"
        )
        return [note]
    if lacking := [name for name in digests if name not in record.tensor_sha256]:
        raise CorruptFileError(
            f"the record of the import lacks the hashes of {len(lacking)} of {len(digests)} "
            "tensors",
            where=fold_layers(lacking),
            hint="restore it, or export with --hf-model, which compares with no import",
        )
    changed = [name for name, digest in digests.items() if record.tensor_sha256.get(name) != digest]
    if changed:
        raise VerificationError(
            f"{len(changed)} of {len(digests)} tensors are not those that were imported",
            where=fold_layers(changed),
            hint="the checkpoint was damaged or changed since its import; to export it as it is, "
            "pass --hf-model",
        )
    return [f"all {len(digests)} tensors have the hashes of the imported checkpoint"]
