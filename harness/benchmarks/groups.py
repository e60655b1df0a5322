"""What `--only` chooses from, and the run over what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from harness.benchmarks import conversions, gpu, models
from harness.benchmarks.results import Measurement
from harness.benchmarks.workspace import SetUpError, Workspace

Group = Callable[[Workspace], list[Measurement]]

GROUPS: Final[Mapping[str, Group]] = MappingProxyType(
    {
        "startup": models.measure_startup,
        "import": conversions.measure_import,
        "export": conversions.measure_export,
        "load": models.measure_load,
        "forward": gpu.measure_forward,
        "sizes": conversions.measure_sizes,
        "budgets": conversions.measure_budgets,
        "workers": conversions.measure_workers,
        "parity": models.measure_parity,
        "oracle": models.measure_oracle,
        "stream": models.measure_stream,
        "peer": models.measure_peer,
    }
)


def measure(work: Workspace, names: Sequence[str]) -> list[Measurement]:
    """Measure group by group. One that cannot be measured is reported as failed, the rest runs."""
    found: list[Measurement] = []
    for name in names:
        work.say(f"== {name}")
        try:
            found += GROUPS[name](work)
        except (SetUpError, OSError) as error:
            found.append(Measurement(group=name, name=name, status="failed", reason=str(error)))
            work.say(f"{name} failed: {error}")
    return found
