"""The verification card of a qualified model, in the schema that Megatron-Bridge's cards have.

Made from the evidence alone. An item is `verified` only if what its name says was run and passed on
the weights of a pinned revision, by a known commit; what was proved on other weights, or on a
twin, is said in `expected_result` and stays `unverified`, as does all that nobody ran.

The schema, as its upstream validator demands it (2026-08): fixed top-level keys; items by fixed
names, those of training below the name of the hardware; an index of item names by status that must
agree with the items; no placeholders, no paths, no addresses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

FILE_NAME: Final = "card.yaml"
MIN_TRANSFORMERS: Final = "4.48.0"
"""The oldest that this project supports; its dependencies say the same, and a test holds them."""
HARDWARE: Final = "H200"
"""What training items are listed under; none of them is run here."""
NO_COMMIT: Final = "0" * 40
"""git's own name for no commit, where none is known; nothing is verified then."""
MODEL_ITEMS: Final = (
    "hf_to_megatron_cpu", "hf_to_megatron_gpu", "megatron_to_hf_cpu", "megatron_to_hf_gpu",
    "manual_forward_pass", "inference",
)  # fmt: skip
TRAINING_ITEMS: Final = (
    "pretrain", "sft", "sft_export_inference", "sft_long_context", "peft", "checkpoint_resume",
)  # fmt: skip
_PRECISION: Final = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_NOT_RUN: Final = "Not run by this qualification."
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d")

Data = Mapping[str, Any]
Item = dict[str, Any]


def card(data: Data) -> dict[str, Any]:
    """The card as plain data, in the order of its keys.

    Args:
        data: Evidence of a qualification.
    """
    scope, origin = data["qualification"]["scope"], data["qualification"]["origin"]
    items = _model_items(data)
    training = {name: {HARDWARE: _training_item(scope)} for name in TRAINING_ITEMS}
    return {
        "title": f"{scope['model']} verification",
        "model": {
            "hf_id": origin["hf_id"] or f"unpublished/{scope['model']}",
            "hf_revision": origin["hf_revision"] or NO_COMMIT,
            "architecture": data["qualification"]["architecture"],
            "min_transformers_version": MIN_TRANSFORMERS,
        },
        "verification_environment": {
            "base_container": origin["base_container"] or "none",
            "bridge_commit": origin["bridge_commit"] or NO_COMMIT,
        },
        "summary": _summary(data),
        "verification_index": {
            "model_level": _by_status(items),
            "training": {
                HARDWARE: _by_status({name: one[HARDWARE] for name, one in training.items()})
            },
        },
        "items": items | training,
    }


def to_yaml(data: Data) -> str:
    """A card as YAML: blocks of mappings, every string quoted, dates as dates."""
    return "\n".join(_lines(data, 0)) + "\n"


def _lines(data: Data, depth: int) -> list[str]:
    found = []
    for key, value in data.items():
        head = f"{'  ' * depth}{key}:"
        if isinstance(value, Mapping) and value:
            found += [head, *_lines(value, depth + 1)]
        elif isinstance(value, str) and _DATE.fullmatch(value):
            found.append(f"{head} {value}")
        else:  # JSON's strings, numbers, null, and lists of them are YAML's, too
            found.append(f"{head} {json.dumps(value)}")
    return found


def unpinned(data: Data) -> list[str]:
    """What is missing for any item to be verified, in words."""
    qualified, scope = data["qualification"], data["qualification"]["scope"]
    origin = qualified["origin"]
    missing = {
        f"the configuration is {scope['stand_in']}": scope["stand_in"] is not None,
        "the weights were pseudo-random": scope["weights"] != "checkpoint",
        "no Hub id is given": origin["hf_id"] is None,
        "no commit of the model is given": origin["hf_revision"] is None,
        "the commit of this code is not known, or it was changed since": (
            origin["bridge_commit"] is None
        ),
        f"the verdict is {data['verdict']}": data["verdict"] != "passed",
    }
    return [reason for reason, holds in missing.items() if holds]


def _summary(data: Data) -> str:
    scope, faults = data["qualification"]["scope"], data["qualification"]["faults"]
    chosen, total = len(scope["blocks"]), scope["num_layers"]
    blocks = f"all {total} blocks" if chosen == total else f"{chosen} of {total} blocks"
    text = (
        f"{data['counts']}. {blocks.capitalize()} at real dimensions against a float64 reference; "
        f"a twin of {len(scope['twin_blocks'])} blocks over {len(scope['layouts'])} layouts; "
        f"{faults['killed']} of {faults['tried']} deliberate faults noticed."
    )
    left = unpinned(data)
    return text if not left else f"{text} Unverified: {'; '.join(left)}."


def _model_items(data: Data) -> dict[str, Item]:
    scope = data["qualification"]["scope"]
    origin, model = data["qualification"]["origin"], scope["model"]
    pinned = not unpinned(data)
    stored = _PRECISION.get(scope["params_dtype"], scope["params_dtype"])
    round_trip = _passed(data, model, "round_trip")
    logits, blocks = _passed(data, model, "logits"), _passed(data, model, "blocks")
    twins = {check: _passed(data, scope["twin"], check) for check in ("round_trip", "generation")}
    whole = len(scope["blocks"]) == scope["num_layers"]
    fetched = ""
    if origin["hf_id"] and origin["hf_revision"]:
        fetched = f"--hf-model {origin['hf_id']} --revision {origin['hf_revision']}"
    small = f"On a shrunk twin with pseudo-random weights: {_said(twins['round_trip'])}"
    found = {
        "hf_to_megatron_cpu": _item(
            data, stored, verified=pinned and bool(round_trip),
            command=f"nemotron-bridge import {fetched} --megatron-path megatron",
            expected=f"Bit for bit: {_said(round_trip)}" if round_trip else small,
        ),
        "hf_to_megatron_gpu": _item(data, stored, verified=False),
        "megatron_to_hf_cpu": _item(
            data, stored, verified=pinned and bool(round_trip) and not scope["paired"],
            command="nemotron-bridge export --megatron-path megatron --hf-path exported",
            expected=f"The source directory, file by file: {_said(round_trip)}"
            if round_trip and not scope["paired"] else small,
        ),
        "megatron_to_hf_gpu": _item(data, stored, verified=False),
        "manual_forward_pass": _item(
            data, _PRECISION[scope["dtype"]], verified=pinned and whole and bool(logits),
            command=f"nemotron-bridge qualify {fetched} --full --report report",
            expected=(
                f"Excess error against a float64 reference over {len(scope['blocks'])} of "
                f"{scope['num_layers']} blocks: {_said(logits)} {_said(blocks)}"
            ),
        ),
        "inference": _item(
            data, _PRECISION[scope["dtype"]], verified=False,
            expected=f"On a shrunk twin, greedy decoding: {_said(twins['generation'])}",
        ),
    }  # fmt: skip
    return {name: found[name] for name in MODEL_ITEMS}


def _item(
    data: Data, precision: str, *, verified: bool, command: str = "", expected: str = _NOT_RUN
) -> Item:
    return {
        "status": "verified" if verified else "unverified",
        "precision": precision,
        "command": command if verified else None,
        "last_verified": data["started"][:10] if verified else None,
        "expected_result": expected,
    }


def _training_item(scope: Data) -> Item:
    return {
        "status": "unverified",
        "precision": _PRECISION.get(scope["params_dtype"], scope["params_dtype"]),
        "command": None,
        "last_verified": None,
        "expected_result": _NOT_RUN,
        "enabled_features": [],
        "metrics": {},
    }


def _by_status(items: Mapping[str, Item]) -> dict[str, list[str]]:
    return {
        status: [name for name, item in items.items() if item["status"] == status]
        for status in ("verified", "unverified")
    }


def _passed(data: Data, model: str, check: str) -> list[Data]:
    """The cases of one check on one model, all of which passed; none if one did not."""
    found = [one for one in data["cases"] if (one["model"], one["check"]) == (model, check)]
    return found if all(one["status"] == "passed" for one in found) else []


def _said(cases: Sequence[Data]) -> str:
    """The worst of them in a sentence, with value, limit and unit."""
    if not cases:
        return "not run, or not passed."
    worst = max(cases, key=lambda one: float(one["value"]))
    return (
        f"{worst['check']} {float(worst['value']):.3g} of at most {float(worst['limit']):.3g} "
        f"{worst['unit']}, the worst of {len(cases)} case{'s' if len(cases) > 1 else ''}."
    )
