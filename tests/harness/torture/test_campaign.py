"""The brute force itself: a short run of it over the product, and over ways of breaking that."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from bridge.errors import UsageError
from harness.errors import TortureError
from harness.torture.campaign import Order, num_kills, run
from harness.torture.results import count_line, document, summary
from harness.torture.scenarios import SCENARIOS, Ground, Prepared
from harness.torture.trials import (
    Outcome,
    Trial,
    errors,
    kills,
    parse_trial,
    role,
    run_trial,
)
from harness.torture.warm import Warm

ROOT = Path(__file__).parents[3]
NAMES = ("export", "export-over")
BREAKS = {
    "moved file by file": """
from bridge.storage import building
def place(site):
    building.sync_directories(site.data)
    site.target.mkdir()
    for path in sorted(site.data.iterdir()):
        path.rename(site.target / path.name)
    site.data.rmdir()
    building.sync_directories(site.target)
    building.sync_directory(site.target.parent)
building.Site.place = place
""",
    "placed before it is verified": """
from bridge.conversion_job import ConversionJob
from bridge.storage import building
verify = ConversionJob.verify
def early(job, *args, **what):
    data = building.site_of(job.target_path) / building.DATA_NAME
    data.rename(job.target_path)
    job.target_path.rename(data)
    return verify(job, *args, **what)
ConversionJob.verify = early
""",
    "the old one removed first": """
import shutil
from bridge.storage import building
def place(site):
    building.sync_directories(site.data)
    shutil.rmtree(site.target, ignore_errors=True)
    site.data.rename(site.target)
    building.sync_directory(site.target.parent)
building.Site.place = place
""",
    "files noted before they are flushed": """
from bridge.storage.new_files import Flusher, NewFile
finish = NewFile.finish
def later(flusher, file, then=None):
    def both():
        if then is not None:
            then()
        finish(file)
    flusher._submit(both)
Flusher.finish = later
NewFile.flush = lambda file: None
""",
    "small files not flushed": """
from bridge.storage import new_checkpoint
def write(directory, name, data):
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(data)
new_checkpoint.write_small_file = write
""",
    "names not flushed": """
from bridge.storage import building, disk, journal
building.sync_directory = disk.sync_directory = journal.sync_directory = lambda directory: None
""",
    "failed flushes passed over": """
from contextlib import suppress
from bridge.storage.new_files import NewFile
finish = NewFile.finish
def pass_over(file):
    with suppress(Exception):
        finish(file)
NewFile.finish = pass_over
""",
    "the site left behind": """
from bridge.storage import building
building.Site.sweep = lambda site: None
""",
}


class Healthy(NamedTuple):
    """What the trials of a broken product are held against: runs of the product as it is."""

    ground: Ground
    prepared: dict[str, Prepared]
    warm: Warm


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Healthy]:
    """Sources, and what two scenarios do and make."""
    ground = Ground(root=tmp_path_factory.mktemp("ground"))
    scenarios = [SCENARIOS[name] for name in NAMES]
    with Warm() as warm:
        ground.make(scenarios, warm)
        prepared = {one.name: ground.prepare(one, warm) for one in scenarios}
        yield Healthy(ground, prepared, warm)


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Warm]]:
    """Give processes whose product is broken in one of the ways above."""
    warms = []

    def start(name: str) -> Warm:
        (tmp_path / "broken_product.py").write_text(BREAKS[name])
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
        warms.append(Warm(["broken_product"]))
        return warms[-1]

    yield start
    for warm in warms:
        warm.close()


def strikes(warm: Warm, healthy: Healthy, scenario: str, fault: str) -> Outcome:
    """Run one trial of a scenario in these processes."""
    trial = parse_trial(f"{scenario}/{fault}")
    name = f"broken-{random.getrandbits(64):x}"
    return run_trial(trial, healthy.prepared[scenario], healthy.ground, warm, name)


@pytest.mark.parametrize(
    ("name", "scenario", "fault", "problem"),
    [
        ("moved file by file", "export", "rename.2-before", "is not right"),
        ("placed before it is verified", "export", "rename.1-after", "is not right"),
        ("the old one removed first", "export-over", "rename.1-before", "it is absent"),
        ("files noted before they are flushed", "export", "fsync.5-power", "exits with 2"),
        ("small files not flushed", "export", "rename.1-power", "is not right"),
        ("failed flushes passed over", "export", "fsync.4-EIO", "a flush failed"),
        ("the site left behind", "export", "rename.1-before", "is left beside the target"),
    ],
)
def test_a_broken_product_is_found_out(
    healthy: Healthy,
    broken: Callable[[str], Warm],
    name: str,
    scenario: str,
    fault: str,
    problem: str,
) -> None:
    """Each classic mistake, at the call that gives it away; as it is, the product survives it."""
    outcome = strikes(broken(name), healthy, scenario, fault)
    assert outcome.struck[0]
    assert problem in " | ".join(outcome.problems)
    assert outcome.said
    assert strikes(healthy.warm, healthy, scenario, fault).problems == ()


def test_names_that_would_not_outlive_a_loss_of_power_are_found_out(
    healthy: Healthy, broken: Callable[[str], Warm]
) -> None:
    """No kill shows them: a clean run does."""
    trial = Trial(scenario=SCENARIOS["export"], faults=())
    outcome = run_trial(
        trial, healthy.prepared["export"], healthy.ground, broken("names not flushed"), "names"
    )
    assert "the names in . would not outlive" in " | ".join(outcome.problems)


def test_a_command_that_fails_unhurt_is_no_result(tmp_path: Path, healthy: Healthy) -> None:
    """Nothing could be told from its trials."""
    ground = Ground(root=tmp_path)
    ground.sources.symlink_to(healthy.ground.root / "nowhere")
    (tmp_path / "logs").mkdir()
    with Warm() as warm, pytest.raises(TortureError, match="though nothing is done to it"):
        ground.prepare(SCENARIOS["export"], warm)


@pytest.mark.timeout(900)
def test_twenty_kills_and_forty_errors_leave_nothing_wrong(tmp_path: Path) -> None:
    """The short form of `nox -s torture`, over a scenario of each kind."""
    order = Order(
        parts=("kills", "errors"), kills=20, errors=40,
        scenarios=("import", "export-over", "import-store", "import-workers"),
    )  # fmt: skip
    seen: list[object] = []
    campaign = run(order, tmp_path, advance=lambda _, one: seen.append(one))
    assert [(one.trial.id, one.problems) for one in campaign.outcomes if one.problems] == []
    assert campaign.problems == []
    assert campaign.passed
    assert seen == campaign.outcomes
    figures = summary(campaign)
    assert figures["kills"] == num_kills(campaign.outcomes) >= 20
    assert figures["errors"] >= 30
    assert figures["resumed"] == figures["resumed_to_identical_bytes"] >= 60
    assert set(figures["killed_runs_by_state"]) <= {"absent", "old", "complete"}
    assert "0 wrong or half-valid targets" in count_line(campaign)
    assert document(campaign)["trials"][0]["id"] == "import/clean"


def test_trials_are_spread_over_every_kind_of_call(healthy: Healthy) -> None:
    """As many as asked for, each a call that was seen, and the rare ones among them."""
    drawn = kills(healthy.prepared, 200, random.Random(1))  # noqa: S311 - can be repeated
    assert len(drawn) == len(kills(healthy.prepared, 200, random.Random(1))) == 200  # noqa: S311
    assert all(trial.kind == "kill" for trial in drawn)
    calls = [name for kind, name, _ in healthy.prepared["export"].calls if kind == "w"]
    struck = {
        calls[int(trial.faults[0].at) - 1]
        for trial in drawn
        if trial.scenario.name == "export" and len(trial.faults) == 1
    }
    assert struck == set(calls)
    failing = errors(healthy.prepared, 60, random.Random(1))  # noqa: S311
    assert len(failing) == 60
    assert {trial.kind for trial in failing} == {"error"}
    assert {trial.faults[0].on for trial in failing} == {"w", "r"}


def test_every_call_is_killed_at_where_the_budget_allows(healthy: Healthy) -> None:
    """Each number once, beside the chains."""
    calls = [kind for kind, _, _ in healthy.prepared["export"].calls if kind == "w"]
    alone = {"export": healthy.prepared["export"]}
    drawn = kills(alone, 2 * len(calls), random.Random(1))  # noqa: S311
    single = [trial.faults[0].at for trial in drawn if len(trial.faults) == 1]
    assert single == list(range(1, len(calls) + 1))


def test_an_id_is_its_trial() -> None:
    """Chains and clean runs, too; anything else is refused."""
    for text in ("import/clean", "export/w3-half", "export-over/w3-half+w40-before+w9-power"):
        assert parse_trial(text).id == text
    with pytest.raises(UsageError, match="no scenario is called 'imprt'"):
        parse_trial("imprt/clean")


def test_roles_leave_out_what_tells_files_apart() -> None:
    """Numbers, names that were drawn, and temporary directories."""
    assert role("place/out/iter_0000000/__1_0.distcp") == "place/out/iter_N/__N_N.distcp"
    assert role("tmp/nemotron-bridge-staging-x8f_/model.safetensors") == "tmp/X/model.safetensors"
