"""Goldens of the pytest plugin: numbers on record beside the test that asks for them.

The habits are the ecosystem's: a missing golden fails, a changed one fails, one that no test uses
fails, and only `--nemotron-golden-update` writes. Standard library alone, until something is
checked: pytest asks for the unused ones at the end of every run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

SCHEMA_VERSION: Final = 1
DIRECTORY: Final = "goldens"
_COLUMNS: Final = 32
"""Tokens whose logits are kept; a log-sum-exp per position stands for all the others."""
_DIGITS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Goldens:
    """The goldens of one test.

    Args:
        directory: Where they are.
        owner: `test_file.py::test_name`, written into each: who is asked about it.
        update: Write instead of compare.
        used: Paths that were asked for; added to.
    """

    directory: Path
    owner: str
    update: bool = False
    used: list[str] = field(default_factory=list)

    def check(self, value: Any, name: str, *, limit: float | None = None) -> None:  # noqa: ANN401 - a path, or any array
        """Hold a checkpoint, or logits, to what is on record; any difference fails the test.

        Args:
            value: A Hugging Face checkpoint directory: its configuration, conversion plan, the
                hash of every tensor and the oracle's logits are on record. Or an array, logits
                with the vocabulary in the last dimension.
            name: Of the golden, letters, digits, `-`, `_` and `.`.
            limit: Largest difference of a logit, in units of their root mean square; by default
                what another BLAS may do to float64. Give what your dtype needs.
        """
        import pytest

        from harness.golden.compare import LOGITS_LIMIT

        if not name or not all(char.isalnum() or char in "-_." for char in name) or name[0] == ".":
            pytest.fail(f"{name!r} is no name for a golden", pytrace=False)
        path = self.directory / f"{name}.json"
        observed = _of_checkpoint(Path(value)) if isinstance(value, str | Path) else _of(value)
        recorded, owner = _read(path)
        if str(path) in self.used or (owner not in {None, self.owner} and not self.update):
            pytest.fail(f"golden {name} belongs to {owner}: give this one a name of its own")
        self.used.append(str(path))
        if self.update:
            document = {"schema_version": SCHEMA_VERSION, "test": self.owner, "golden": observed}
            self.directory.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", "utf-8")
            return
        if recorded is None:
            pytest.fail(
                f"golden {name} is missing: {path}\n"
                "look at the values, then record them with --nemotron-golden-update",
                pytrace=False,
            )
        problems = _differences(recorded, observed, LOGITS_LIMIT if limit is None else limit)
        if problems:
            pytest.fail("\n".join([f"golden {name} ({path}):", *problems]), pytrace=False)


def _read(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What is on record, and for which test; None, None where nothing is."""
    import pytest

    try:
        document = json.loads(path.read_text("utf-8"))
        if document["schema_version"] == SCHEMA_VERSION:
            return dict(document["golden"]), str(document["test"])
        problem = f"schema_version must be {SCHEMA_VERSION}"
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error)
    raise pytest.fail.Exception(f"not a golden: {path}: {problem}", pytrace=False)


def _of_checkpoint(directory: Path) -> dict[str, Any]:
    from bridge.convert import read_spec
    from bridge.hf_config import load_hf_config
    from bridge.plan import Plan
    from harness.compare import oracle_weights, read_safetensors
    from harness.golden.tensors import describe_tensors
    from harness.oracle import forward
    from harness.probes import short_probe

    config, spec = load_hf_config(directory), read_spec(directory)
    probe = short_probe(spec.vocab_size)
    logits = forward(config, oracle_weights(directory), probe.input_ids, probe.position_ids)
    return {
        "config": config,
        "plan": Plan(spec, spec.padded_vocab_size(1)).digest(),
        "tensors": describe_tensors(read_safetensors(directory)),
        **_of(logits),
    }


def _of(value: Any) -> dict[str, Any]:  # noqa: ANN401 - any array, a torch tensor among them
    """Logits in few numbers: some columns, and what all of them add up to, at each position."""
    import numpy as np
    import pytest

    if hasattr(value, "detach"):
        value = value.detach().cpu().double()
    logits = np.asarray(value, dtype=np.float64)
    if logits.ndim == 0 or not logits.size or not np.isfinite(logits).all():
        pytest.fail(
            f"nothing to hold on to in logits of shape {logits.shape}: empty, or not finite"
        )
    last = logits.shape[-1] - 1
    count = min(_COLUMNS, last + 1)
    columns = [index * last // max(1, count - 1) for index in range(count)]
    rows = logits.reshape(-1, last + 1)
    top = rows.max(axis=1, keepdims=True)
    together = np.log(np.exp(rows - top).sum(axis=1, keepdims=True)) + top
    kept = np.concatenate([rows[:, columns], together], axis=1)
    return {
        "shape": list(logits.shape),
        "columns": columns,
        "logits": [[float(f"{one:.{_DIGITS}g}") for one in row] for row in kept.tolist()],
    }


def _differences(
    recorded: Mapping[str, Any], observed: Mapping[str, Any], limit: float
) -> list[str]:
    import numpy as np

    from harness.golden.compare import differences

    def rest(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in fields.items() if key != "logits"}

    problems = differences(rest(recorded), rest(observed))
    was, now = (np.array(fields.get("logits", []), float) for fields in (recorded, observed))
    if was.shape != now.shape or not was.size:
        return [*problems, f"logits: {now.shape} numbers, {was.shape} are on record"]
    scale = float(np.sqrt(np.mean(was * was)))
    gap = np.abs(now - was)
    wrong = ~(gap <= limit * scale)
    if wrong.any():
        row, column = map(int, np.unravel_index(int(gap.argmax()), gap.shape))
        problems.append(
            f"logits: {int(wrong.sum())} of {gap.size} numbers differ by more than {limit:g} x rms "
            f"{scale:.3g}; most at position {row}, column {column}: {now[row, column]:.10g}, on "
            f"record is {was[row, column]:.10g}; mean difference {gap.mean():.3g}"
        )
    return problems


def unused(
    *, partial: bool, used: Sequence[str], passed: Sequence[str], collected: Sequence[str]
) -> list[Path]:
    """The goldens beside collected tests that nobody uses.

    Args:
        partial: Single tests were named, so that one that was not collected may still exist.
        used: Paths that were asked for.
        passed: `path/test_file.py::test_name` of what has passed.
        collected: The same of all tests there are.

    Returns:
        Those whose test passed without asking, or is gone. A golden whose test was left out or
        failed early is nobody's fault.
    """
    modules = {Path(one.partition("::")[0]) for one in collected}
    found = []
    for folder in sorted({module.parent / DIRECTORY for module in modules}):
        for path in sorted(folder.glob("*.json")):
            if str(path) in used:
                continue
            owner = f"{folder.parent / _owner(path)}"
            module = Path(owner.partition("::")[0])
            gone = owner not in collected and (module in modules or not module.exists())
            if owner in passed or (gone and not partial):
                found.append(path)
    return found


def _owner(path: Path) -> str:
    try:
        return str(json.loads(path.read_text("utf-8"))["test"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # no test can ask for it: it is as good as gone
