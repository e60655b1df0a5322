"""The verification card: valid by the upstream's schema, and no item claims what was not run."""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.report import card
from harness.report.card import MIN_TRANSFORMERS, to_yaml

ROOT = Path(__file__).parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Data = dict[str, Any]

# --------------------------------------------------------------------------------------
# The schema, as the upstream's validator demands it
# --------------------------------------------------------------------------------------

TOP = ["title", "model", "verification_environment", "summary", "verification_index", "items"]
MODEL_LEVEL = {
    "hf_to_megatron_cpu", "hf_to_megatron_gpu", "megatron_to_hf_cpu", "megatron_to_hf_gpu",
    "manual_forward_pass", "inference",
}  # fmt: skip
TRAINING = {
    "pretrain",
    "sft",
    "sft_export_inference",
    "sft_long_context",
    "peft",
    "checkpoint_resume",
}
ITEM = {"status", "precision", "command", "last_verified", "expected_result"}
STATUSES = {"unverified", "verified", "unsupported", "not_applicable"}
FORBIDDEN_KEYS = re.compile(r"host|job|account|cluster|container|evidence|mount")
FORBIDDEN_TEXT = {
    "a placeholder": re.compile(r"TODO|TBD|<[^>]*>"),
    "an absolute path": re.compile(r"(?:^|[\s'\"=(])(?:/|~/)[\w.]"),
    "a URL": re.compile(r"\w+://"),
    "an e-mail address": re.compile(r"\S+@\S+\.\w+"),
    "an IP address": re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b"),
    "a scheduler or container command": re.compile(r"\b(?:sbatch|srun|docker|kubectl|enroot)\b"),
}


class _Unique(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is not typed
    """Refuses repeated keys."""


def _mapping(loader: _Unique, node: yaml.MappingNode) -> Data:
    keys = [loader.construct_object(key) for key, _ in node.value]
    assert len(set(keys)) == len(keys), f"repeated keys in {keys}"
    return dict(loader.construct_pairs(node, deep=True))


_Unique.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def problems_of(text: str) -> list[str]:
    """Everything about a card that the upstream would refuse."""
    for token in yaml.scan(text):
        if isinstance(token, yaml.AnchorToken | yaml.AliasToken | yaml.TagToken):
            return ["anchors, aliases and tags are not allowed"]
    data = yaml.load(text, Loader=_Unique)  # noqa: S506 - a SafeLoader
    found = list(_texts(data, ()))
    if list(data) != TOP:
        return [*found, f"top-level keys {list(data)}"]
    model, environment = data["model"], data["verification_environment"]
    for keys, group in (
        ({"hf_id", "hf_revision", "architecture", "min_transformers_version"}, model),
        ({"base_container", "bridge_commit"}, environment),
    ):
        found += [f"keys {sorted(group)}"] if set(group) != keys else []
    for value, form in (
        (model["hf_id"], r"[\w.-]+/[\w.-]+"),
        (model["hf_revision"], r"[0-9a-f]{40}"),
        (model["min_transformers_version"], r"\d+\.\d+\.\d+"),
        (environment["bridge_commit"], r"[0-9a-f]{40}"),
    ):
        found += [] if re.fullmatch(form, value) else [f"{value} is not {form}"]
    pinned = set(model["hf_revision"]) != {"0"} and set(environment["bridge_commit"]) != {"0"}
    items = data["items"]
    if set(items) != MODEL_LEVEL | TRAINING:
        return [*found, f"items {sorted(items)}"]
    index: dict[str, Any] = {"model_level": {}, "training": {}}
    for name, one in items.items():
        nested = {None: one} if name in MODEL_LEVEL else one
        for hardware, item in nested.items():
            wanted = ITEM if hardware is None else ITEM | {"enabled_features", "metrics"}
            found += _item(f"{name} {hardware}", item, wanted, pinned=pinned)
            place = (
                index["model_level"]
                if hardware is None
                else index["training"].setdefault(hardware, {})
            )
            place.setdefault(item["status"], []).append(name)
    said = data["verification_index"]
    for group in (said["model_level"], *said["training"].values()):
        for status in [key for key, names in group.items() if not names]:
            del group[status]
    return found + ([] if said == index else [f"the index says {said}, the items {index}"])


def _item(name: str, item: Data, wanted: set[str], *, pinned: bool) -> list[str]:
    found = []
    if set(item) != wanted:
        found.append(f"{name}: keys {sorted(item)}")
    if item["status"] not in STATUSES:
        found.append(f"{name}: status {item['status']}")
    if item["status"] == "verified":
        dated = type(item["last_verified"]) is dt.date
        if not (item["command"] and dated and pinned):
            found.append(f"{name}: verified without a command, a date or a pinned revision")
    elif item["last_verified"] is not None:
        found.append(f"{name}: a date, and not verified")
    return found


def _texts(value: object, place: tuple[str, ...]) -> list[str]:
    if isinstance(value, dict):
        found = []
        for key, one in value.items():
            if FORBIDDEN_KEYS.search(key) and key != "base_container":
                found.append(f"key {key}")
            found += _texts(one, (*place, key))
        return found
    if isinstance(value, list):
        return [problem for one in value for problem in _texts(one, place)]
    return [
        f"{'.'.join(place)}: {what}"
        for what, pattern in FORBIDDEN_TEXT.items()
        if isinstance(value, str) and pattern.search(value)
    ]


# --------------------------------------------------------------------------------------
# Cards
# --------------------------------------------------------------------------------------


def case(check: str, model: str, status: str = "passed", value: float = 0.0) -> Data:
    """A case, as far as a card looks at it."""
    return {
        "check": check, "model": model, "status": status, "value": value, "limit": 2.0,
        "unit": "differences",
    }  # fmt: skip


def evidence(**changes: Any) -> Data:  # noqa: ANN401 - of any of the fields
    """Of a whole qualification of a pinned checkpoint, every block, by a known commit."""
    scope = {
        "model": "m", "twin": "m-twin", "weights": "checkpoint", "paired": False, "stand_in": None,
        "params_dtype": "bfloat16", "dtype": "float32", "blocks": [0, 1], "num_layers": 2,
        "twin_blocks": [0, 1], "layouts": ["tp1-pp1"],
    }  # fmt: skip
    origin = {
        "hf_id": "nvidia/M-1.0", "hf_revision": COMMIT, "bridge_commit": COMMIT[::-1],
        "base_container": "pytorch:26.02",
    }  # fmt: skip
    checks = ("round_trip", "logits", "blocks")
    data: Data = {
        "verdict": "passed", "counts": "5 passed, 0 failed", "started": "2026-03-04T05:06:07+00:00",
        "cases": [
            *(case(check, "m", value=0.5) for check in checks),
            *(case(check, "m-twin") for check in ("round_trip", "generation")),
        ],
        "qualification": {
            "architecture": "DeciLMForCausalLM",
            "scope": scope | {k: v for k, v in changes.items() if k in scope},
            "origin": origin | {k: v for k, v in changes.items() if k in origin},
            "faults": {"tried": 90, "killed": 90},
        },
    }  # fmt: skip
    return data | {key: value for key, value in changes.items() if key in data}


def verified(data: Data) -> set[str]:
    """Items that the card says are verified; it must be valid."""
    text = to_yaml(card.card(data))
    assert problems_of(text) == []
    found = yaml.safe_load(text)["items"]
    return {
        name
        for name, item in found.items()
        if item.get("status", "unverified") == "verified"
        or any(isinstance(one, dict) and one.get("status") == "verified" for one in item.values())
    }


def failing(check: str) -> list[Data]:
    """The cases, one of which failed."""
    return [
        one | ({"status": "failed"} if (one["check"], one["model"]) == (check, "m") else {})
        for one in evidence()["cases"]
    ]


def test_what_was_run_on_pinned_weights_is_verified_and_nothing_else() -> None:
    """Training, GPUs and inference were not run by a qualification."""
    assert verified(evidence()) == {
        "hf_to_megatron_cpu", "megatron_to_hf_cpu", "manual_forward_pass",
    }  # fmt: skip
    items = card.card(evidence())["items"]
    assert items["hf_to_megatron_cpu"]["precision"] == "bf16"
    assert items["manual_forward_pass"]["precision"] == "fp32"
    assert "0.5 of at most 2 differences" in items["hf_to_megatron_cpu"]["expected_result"]
    assert COMMIT in items["hf_to_megatron_cpu"]["command"]
    assert str(items["inference"]["last_verified"]) == "None"


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "synthetic"}, {"hf_id": None}, {"hf_revision": None}, {"bridge_commit": None},
        {"verdict": "failed"}, {"verdict": "incomplete"}, {"stand_in": "a stand-in"},
    ],
    ids=str,
)  # fmt: skip
def test_without_pins_or_a_verdict_nothing_is_verified_and_the_summary_says_why(
    changes: Data,
) -> None:
    """And the card is valid all the same."""
    data = evidence(**changes)
    assert verified(data) == set()
    assert "Unverified: " in card.card(data)["summary"]
    assert card.unpinned(data)


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"blocks": [0]}, {"hf_to_megatron_cpu", "megatron_to_hf_cpu"}),
        ({"paired": True}, {"hf_to_megatron_cpu", "manual_forward_pass"}),
        ({"cases": failing("logits")}, {"hf_to_megatron_cpu", "megatron_to_hf_cpu"}),
        ({"cases": failing("round_trip")}, {"manual_forward_pass"}),
        ({"cases": []}, set()),
    ],
    ids=["some blocks", "a pair", "logits failed", "round trip failed", "nothing was run"],
)
def test_an_item_is_verified_by_its_own_cases(changes: Data, left: set[str]) -> None:
    """Whatever the others say."""
    assert verified(evidence(**changes)) == left


def test_the_card_of_a_real_bundle_is_valid(finished: Path) -> None:
    """Of pseudo-random weights, so nothing on it is verified."""
    text = (finished / card.FILE_NAME).read_text("utf-8")
    assert problems_of(text) == []
    assert "unverified/odd" not in text
    assert 'status: "verified"' not in text


def test_the_oldest_transformers_is_the_one_that_the_project_asks_for() -> None:
    """Of the dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (wanted,) = [one for one in project["dependencies"] if one.startswith("transformers")]
    assert f">={MIN_TRANSFORMERS.removesuffix('.0')}," in wanted


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('title: "', 'title: "TODO '), ('title: "', 'title: "see http://x '),
        ('title: "', 'title: "/home/me '), ("title:", "extra: 1\ntitle:"),
        ("summary:", 'title: "x"\nsummary:'), ('"verified"', '"done"'),
        ("2026-03-04", '"2026-03-04"'), (COMMIT, "main"), ("  inference:", "  inferring:"),
        ('status: "verified"', 'status: "unverified"'), ("metrics: {}", "hostname: 1"),
        ('"nvidia/M-1.0"', '"M-1.0"'), ("command:", "command: &a"),
    ],
    ids=str,
)  # fmt: skip
def test_the_validator_of_these_tests_can_fail(before: str, after: str) -> None:
    """Each rule refuses a card that breaks it."""
    text = to_yaml(card.card(evidence()))
    assert before in text
    try:
        found = problems_of(text.replace(before, after, 1))
    except (AssertionError, KeyError, yaml.YAMLError) as error:
        found = [str(error)]
    assert found
