"""Laws held to real models: converted files, live Hugging Face models, Megatron-Core ranks.

Each law is held to a few samples that together have every feature it stands for, and to more drawn
ones in the larger profiles. A sample that breaks one is shrunk, and left as a directory with the
command that replays it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bridge.convert import import_checkpoint
from harness.bench import Bench, Subject
from harness.live import ModelRequest
from harness.replay import replay_on, run_replay, write_model
from harness.runner import Result
from harness.samples import LIVE_FEATURES, Sample, covering_samples, draw_samples
from harness.shrink import report, shrink
from harness.suite import Compute
from harness.thresholds import judge_logits

if TYPE_CHECKING:
    from tests.property import law_ranks
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    import law_ranks

pytestmark = pytest.mark.ranks

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "dev")
COMPUTE = Compute(
    dtype=os.environ.get("NEMOTRON_BRIDGE_DTYPE", "float32"),
    device=os.environ.get("NEMOTRON_BRIDGE_DEVICE", "cpu"),
    layers=os.environ.get("NEMOTRON_BRIDGE_LAYERS", "local"),
)
"""The laws hold everywhere: what to compute in, where, and by which layers."""
MORE = {"dev": 0, "ci": 4, "nightly": 300}
"""Samples besides the covering ones, by profile."""
SHRINK_TRIES = 60
Law = Callable[[Bench, Sample], str]
"""What is wrong with a sample; nothing where the law holds."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One set of ranks for all samples."""
    with Bench(tmp_path_factory.mktemp("laws"), timeout=120) as found:
        found.pool(COMPUTE.device, COMPUTE.layers).warm_up()
        yield found


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Every feature, then more; other samples on every nightly run."""
    start = int.from_bytes(os.urandom(3)) if PROFILE == "nightly" else 0
    chosen = covering_samples(start=start)
    met = frozenset[str]().union(*(sample.features for sample in chosen))
    assert met >= LIVE_FEATURES
    return chosen + (draw_samples(MORE[PROFILE], start=start + 7) if MORE[PROFILE] else [])


def hold(law: Law, check: str, bench: Bench, samples: list[Sample]) -> None:
    """Hold all samples to a law; the first that breaks it is shrunk and written down."""
    assert samples
    for sample in samples:
        wrong = law(bench, sample)
        if wrong:
            small = shrink(sample, lambda one: bool(law(bench, one)), max_tries=SHRINK_TRIES).sample
            directory = Path(tempfile.mkdtemp(prefix=f"nemotron-bridge-{check}-"))
            replay = replay_on(small.layout, check, seed=small.seed, compute=COMPUTE)
            command = report(small, directory, replay, summary=wrong)
            pytest.fail(f"{wrong}\nof {sample.describe()}\nsmallest: {small.describe()}\n{command}")


def verdict(result: Result) -> str:
    """What a check has to say against a sample."""
    return "" if result.status == "passed" else f"{result.summary}\n{result.traceback}"


def checked(check: str, probe: str = "long") -> Law:
    """A check of the harness as a law."""

    def law(bench: Bench, sample: Sample) -> str:
        replay = replay_on(sample.layout, check, seed=sample.seed, probe=probe, compute=COMPUTE)
        return verdict(run_replay(sample.config, replay, bench))

    return law


def files_of_any_layout_load_on_any_other(bench: Bench, sample: Sample) -> str:
    """Cut for TP x PP of the sample's own kind, loaded where the sample lies: `load_hf`'s bits."""
    layout = sample.parallel_layout
    with tempfile.TemporaryDirectory(dir=bench.workdir) as name:
        root = Path(name)
        hf = write_model(sample.config, root / "hf", seed=sample.seed)
        cuts = {(1, 1), (layout.tensor_model_parallel_size, min(2, sample.spec.num_layers))}
        found: list[str] = []
        for tp, pp in sorted(cuts):
            target = root / f"tp{tp}-pp{pp}"
            import_checkpoint(
                hf, target, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
            )
            wanted = ModelRequest(
                spec=sample.spec,
                layout=layout,
                params_dtype=sample.spec.params_dtype,
                kind="hf",
                path=hf,
                device="cuda" if COMPUTE.device == "cuda" else "cpu",
                layers=COMPUTE.layers,
            )
            ranks = bench.pool(COMPUTE.device, COMPUTE.layers).run(
                layout, law_ranks.both_ways, wanted, replace(wanted, kind="megatron", path=target)
            )
            found += [f"cut for tp{tp}-pp{pp}: {name}" for names, _ in ranks for name in names]
            if not sum(count for _, count in ranks):
                found.append(f"cut for tp{tp}-pp{pp}: nothing was compared")
    return "\n".join(found)


def the_reference_is_sane(bench: Bench, sample: Sample) -> str:
    """Transformers' model against the oracle, in float32, both probes; no Megatron."""
    found = []
    with tempfile.TemporaryDirectory(dir=bench.workdir) as name:
        path = write_model(sample.config, Path(name) / "model" / "hf", seed=sample.seed)
        own = bench.beside(Path(name), {"sample": Subject(name="sample", hf=path)})
        for probe in ("short", "long"):
            case = COMPUTE.case("logits", "sample", probe=probe)
            logits = own.reference_logits(case)
            judged = judge_logits(logits, logits, own.oracle_logits(case), dtype=COMPUTE.dtype)
            found += [one.describe() for one in judged.verdicts if not one.passed]
    return "\n".join(found)


def test_a_round_trip_gives_every_byte_again(bench: Bench, samples: list[Sample]) -> None:
    """Import for the drawn layout, then export: the same files."""
    hold(checked("round_trip"), "round_trip", bench, samples)


def test_files_load_on_ranks_of_another_layout(bench: Bench, samples: list[Sample]) -> None:
    """Resharding changes no bit."""
    hold(files_of_any_layout_load_on_any_other, "resharding", bench, samples)


def test_the_hugging_face_model_agrees_with_the_oracle(bench: Bench, samples: list[Sample]) -> None:
    """An error of rounding size, DeciLM and Llama alike."""
    hold(the_reference_is_sane, "logits", bench, samples)


@pytest.mark.parametrize("probe", ["short", "long"])
def test_megatron_ranks_agree_with_the_oracle(
    bench: Bench, samples: list[Sample], probe: str
) -> None:
    """As close to the truth as the reference, on every rank that the layout has."""
    hold(checked("logits", probe), "logits", bench, samples)
