"""Loading a model, and what a proof costs: start-up, the parity suite, the oracle, streaming."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import psutil

from harness.benchmarks import gpu
from harness.benchmarks.card import NO_GPU, has_gpu
from harness.benchmarks.process import OURS, program
from harness.benchmarks.profile import GIB, MAX_HELP_SECONDS, MAX_START_SECONDS
from harness.benchmarks.results import Measurement, not_run
from harness.benchmarks.trials import Trial, failed, in_turns, measurement
from harness.benchmarks.workspace import Workspace, size_of, variant

_BESIDES: Final = 2 * GIB
"""Memory that a process with torch, Megatron-Core and a model needs besides the model."""

_GPU_CASES: Final = (
    *("--suite", "parity_gpu", "--allow-not-run", "transformer-engine"),
    *("--select", "*/nano-8b/tp1-pp1/*/cuda", "--select", "*/nano-8b/tp1-pp1/*/cuda/te-unfused"),
)
"""A few of the suite's, by both kinds of layers."""


def measure_load(work: Workspace) -> list[Measurement]:
    """Hugging Face files straight into a GPTModel, against `cp -r` of the files.

    On a GPU against other things; see `gpu.measure_load`.
    """
    if work.profile.device == "cuda":
        return gpu.measure_load(work)
    size = work.profile.main_size
    free = psutil.virtual_memory().available
    if free < size + _BESIDES:
        reason = f"{size / 1e9:.1f} GB of model and {free / 1e9:.1f} GB of memory available"
        return not_run("load", "load into GPTModel", reason)
    hf, target = work.hf(size), work.directory / "copy"
    nbytes = size_of(hf)
    found = []
    copy = Trial(name="cp -r", command=("cp", "-r", hf, target), source=hf, target=target)
    load = Trial(
        name="load into GPTModel on cpu",
        command=program("trial_load", hf, "bfloat16", "cpu"),
        source=hf,
        details=lambda run: run.json() or {},
    )
    for cache in ("warm", "cold"):
        outcomes = in_turns(work, [copy, load], repeats=work.profile.repeats, cache=cache)
        conditions = {"size_bytes": nbytes, "cache": cache}
        for trial in (copy, load):
            references = {} if trial is copy else {"cp": outcomes[copy.name]}
            found.append(
                measurement(
                    "load", trial, outcomes[trial.name], conditions=conditions, size=nbytes,
                    references=references,
                )
            )  # fmt: skip
    return found


def measure_startup(work: Workspace) -> list[Measurement]:
    """What is over at once is all start-up."""
    config, target = variant("Llama-3_1-Nemotron-Ultra-253B-v1"), work.directory / "target"
    toy: list[str | Path] = ["--hf-model", work.toy(), "--megatron-path", target]
    trials = [
        Trial(name="--help", command=[*OURS, "--help"]),
        Trial(name="inspect Ultra-253B", command=[*OURS, "inspect", config]),
        Trial(name="import of a toy", command=[*OURS, "import", *toy], target=target),
    ]
    bounds = [MAX_HELP_SECONDS, MAX_START_SECONDS, MAX_START_SECONDS]
    in_turns(work, trials, repeats=1)  # Python compiles what it has not compiled yet
    outcomes = in_turns(work, trials, repeats=work.profile.start_repeats)
    return [
        measurement(
            "startup", trial, outcomes[trial.name], conditions={"cache": "warm"},
            limits={"median_seconds": bound},
        )
        for trial, bound in zip(trials, bounds, strict=True)
    ]  # fmt: skip


def measure_parity(work: Workspace) -> list[Measurement]:
    """Seconds of each case of the parity suite, by check; on a GPU of some cases of its own."""
    cases = [part for one in work.profile.parity_select for part in ("--select", one)]
    if work.profile.device == "cuda":
        if not has_gpu():
            return not_run("parity", "parity", NO_GPU)
        cases = list(_GPU_CASES)
    work.say("running the parity suite")
    run = work.run([*OURS, "parity", *cases, "--format", "json"], tree=True)
    evidence = run.json()
    if run.failure or evidence is None:
        return [failed("parity", "parity", run)]
    by_check: dict[str, list[float]] = {}
    for case in evidence["cases"]:
        if case["status"] == "passed":
            kind = "" if case["layers"] == "local" else f", {case['layers']} layers"
            by_check.setdefault(f"{case['check']}{kind}", []).append(case["seconds"])
    whole = Measurement(
        group="parity", name="the run", samples=[run.seconds],
        values={
            "cases": float(len(evidence["cases"])),
            "peak_rss_bytes": float(run.peak_rss),
        },
    )  # fmt: skip
    return [
        whole,
        *(
            Measurement(
                group="parity", name=f"a case of {check}", samples=seconds,
                values={
                    "cases": float(len(seconds)),
                    "slowest_seconds": max(seconds),
                    "total_seconds": sum(seconds),
                },
            )
            for check, seconds in by_check.items()
        ),
    ]  # fmt: skip


def measure_oracle(work: Workspace) -> list[Measurement]:
    """One block of the oracle, held against a plain float64 matmul."""
    name, profile = "one block, float64", work.profile
    work.say("running the oracle")
    run = work.run(
        [
            *program("trial_oracle", work.config(profile.main_size)),
            *(str(profile.oracle_tokens), str(profile.repeats)),
        ]
    )
    found = run.json()
    if run.failure or found is None:
        return [failed("oracle", name, run)]
    samples = found.pop("samples")
    values = {key: float(value) for key, value in found.items()}
    values["share_of_matmul"] = values["gflop_per_second"] / values["matmul_gflop_per_second"]
    values["peak_rss_bytes"] = float(run.peak_rss)
    return [Measurement(group="oracle", name=name, samples=samples, values=values)]


def measure_stream(work: Workspace) -> list[Measurement]:
    """`verify --stream` on a configuration with synthetic weights: all three sides, by block.

    On a GPU beside what it could do; see `gpu.measure_stream`.
    """
    if work.profile.device == "cuda":
        return gpu.measure_stream(work)
    name = "verify --stream"
    config = work.config(work.profile.main_size)
    work.say("streaming")
    run = work.run([*OURS, "verify", "--config", config, "--stream", "--json"])
    if run.failure:
        return [failed("stream", name, run)]
    parameters = work.profile.main_size / 2
    values = {
        "parameters": parameters,
        "parameters_per_second": parameters / run.seconds,
        "peak_rss_bytes": float(run.peak_rss),
    }
    return [Measurement(group="stream", name=name, samples=[run.seconds], values=values)]


def measure_peer(work: Workspace) -> list[Measurement]:
    """Megatron-Bridge's own conversion of the same checkpoint, where it is installed."""
    name, python = "Megatron-Bridge", work.peer_python
    probe = (
        "import importlib.util as u;"
        "raise SystemExit(not (u.find_spec('megatron') and u.find_spec('megatron.bridge')))"
    )
    if work.run([python, "-c", probe]).exit_code:
        return not_run("peer", name, "not installed; --peer-python names an interpreter with it")
    size = work.profile.main_size
    hf, made, target = work.hf(size), work.directory / "peer", work.directory / "target"
    program = Path(__file__).with_name("trial_peer.py")
    copy = Trial(name="cp -r", command=("cp", "-r", hf, target), source=hf, target=target)
    import_ = Trial(
        name=f"{name} import", command=(python, program, "import", hf, target), source=hf,
        target=target,
    )  # fmt: skip
    export = Trial(
        name=f"{name} export", command=(python, program, "export", hf, made, target), source=made,
        target=target,
    )  # fmt: skip
    first = work.run((python, program, "import", hf, made))  # what the export reads
    if first.failure:
        return [failed("peer", import_.name, first)]
    trials = [copy, import_, export]
    outcomes = in_turns(work, trials, repeats=work.profile.repeats)
    nbytes = size_of(hf)
    return [
        measurement(
            "peer", trial, outcomes[trial.name],
            conditions={"size_bytes": nbytes, "cache": "warm"}, size=nbytes,
            references={} if trial is copy else {"cp": outcomes[copy.name]},
        )
        for trial in trials
    ]  # fmt: skip
