"""Loading, forward passes and streamed proofs on a GPU, each beside what the device could do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from bridge.reading import TransferLimits
from harness.benchmarks.arithmetic import StreamBounds, forward_flops
from harness.benchmarks.card import NO_GPU, Card, has_gpu
from harness.benchmarks.process import OURS, Run, program
from harness.benchmarks.results import Measurement, not_run
from harness.benchmarks.trials import Cache, Outcome, Trial, failed, in_turns, measurement
from harness.benchmarks.workspace import Workspace, size_of, variant

_STREAMED: Final = "Llama-3.1-Nemotron-Nano-8B-v1"
"""Whole, whatever the sizes of a profile: its weights are on no disk."""
_DTYPE: Final = "bfloat16"
_CACHES: Final[tuple[Cache, ...]] = ("warm", "cold")


def measure_load(work: Workspace) -> list[Measurement]:
    """Hugging Face files into a GPTModel on a GPU, beside reading them and copying them there."""
    name = "load into GPTModel on cuda"
    if not has_gpu():
        return not_run("load", name, NO_GPU)
    card, hf = Card.of(work), work.hf(work.profile.main_size)
    nbytes = size_of(hf)
    reads = [
        Trial(
            name=f"read, {threads} at once",
            command=program("trial_read", hf, str(threads)),
            source=hf, details=_printed, counted="read_seconds",
        )
        for threads in sorted({1, TransferLimits().threads})
    ]  # fmt: skip
    plain = Trial(
        name="safetensors load_file to cuda",
        command=program("trial_load_file", hf, "cuda"),
        source=hf, details=_printed, counted="load_file_seconds",
    )  # fmt: skip
    load = Trial(
        name=name,
        command=program("trial_load", hf, _DTYPE, "cuda"),
        source=hf, details=_printed, counted="load_seconds",
    )  # fmt: skip
    found = [card.copy_row("load", "copy from pinned memory", "from_host")]
    for cache in _CACHES:
        trials = [*reads, plain, load]
        outcomes = in_turns(work, trials, repeats=work.profile.repeats, cache=cache)
        fastest = min(
            (outcomes[one.name] for one in reads if outcomes[one.name].median),
            key=lambda one: one.median or 0.0,
            default=None,
        )
        for trial in trials:
            references: dict[str, Outcome | None] = {}
            if trial not in reads:
                references["read"] = fastest
            if trial is load:
                references["load_file"] = outcomes[plain.name]
            row = measurement(
                "load", trial, outcomes[trial.name],
                conditions={"size_bytes": nbytes, "cache": cache}, size=nbytes,
                references=references,
            )  # fmt: skip
            found.append(row if trial in reads else _beside_copy(row, card, outcomes[plain.name]))
    return found


def _printed(run: Run) -> Mapping[str, float]:
    """What a trial says of itself, but for the bytes: all read the same."""
    found: dict[str, float] = run.json() or {}
    return {name: value for name, value in found.items() if name != "nbytes"}


def _beside_copy(row: Measurement, card: Card, plain: Outcome) -> Measurement:
    """The same with its share of the copy rate and, of a model, what it took with building it.

    `load_file` allocates what it fills, and a model is allocated when it is built.
    """
    if row.status != "measured" or not row.median_seconds:
        return row
    values = dict(row.values)
    values["share_of_host_copy"] = values["gb_per_second"] * 1e9 / card.from_host
    if "build_seconds" in values and plain.median:
        both = row.median_seconds + values["build_seconds"]
        values["built_ratio_to_load_file"] = both / plain.median
    return replace(row, values=values)


def measure_forward(work: Workspace) -> list[Measurement]:
    """Forward passes of the converted model in turns with Hugging Face's, on the same tokens."""
    name, profile = "forward pass", work.profile
    if profile.device != "cuda":
        return not_run("forward", name, "on a GPU only: --device cuda")
    if not has_gpu():
        return not_run("forward", name, NO_GPU)
    card, hf = Card.of(work), work.hf(profile.main_size)
    work.say("running forward passes")
    shapes = [f"{batch}x{sequence}" for batch, sequence in profile.forward_shapes]
    command = program("trial_forward", hf, _DTYPE, profile.device)
    run = work.run([*command, str(profile.forward_repeats), *shapes])
    found = run.json()
    if run.failure or found is None:
        return [failed("forward", name, run)]
    rows = [card.products_row("forward", _DTYPE)]
    for one in found["shapes"]:
        flops = _flops(work, one["batch"], one["sequence"])
        rows += _both(found, one, nbytes=size_of(hf), flops=flops, card=card)
    return rows


def _flops(work: Workspace, batch: int, sequence: int) -> int:
    from bridge.convert import read_spec
    from bridge.parameters import block_num_parameters, output_num_parameters

    spec = read_spec(work.config(work.profile.main_size))
    blocks = sum(block_num_parameters(spec, layer) for layer in range(spec.num_layers))
    return forward_flops(
        parameters=blocks + output_num_parameters(spec),
        batch=batch,
        sequence=sequence,
        attention_width=spec.num_attention_heads * spec.kv_channels,
        num_layers=spec.num_layers,
    )


def _both(
    found: Mapping[str, Any], one: Mapping[str, Any], *, nbytes: int, flops: int, card: Card
) -> list[Measurement]:
    """The rows of one shape: the reference, and the model beside it."""
    rows: list[Measurement] = []
    conditions = {
        "size_bytes": nbytes,
        "batch": one["batch"],
        "sequence": one["sequence"],
        "dtype": _DTYPE,
    }
    names = {"theirs": found["reference"], "ours": f"GPTModel, {found['layers']} layers"}
    for side, name in names.items():
        row = Measurement(
            group="forward", name=name, conditions=conditions, samples=one["samples"][side]
        )
        seconds = row.median_seconds or float("nan")
        values = {
            "tokens_per_second": one["batch"] * one["sequence"] / seconds,
            "gflop_per_second": flops / seconds / 1e9,
            "share_of_matmul": flops / seconds / card.products(_DTYPE),
        }
        if side == "ours":
            values["ratio_to_hf"] = seconds / (rows[0].median_seconds or float("nan"))
            values["logits_difference"] = one["difference"]
        rows.append(replace(row, values=values))
    return rows


def measure_stream(work: Workspace) -> list[Measurement]:
    """`verify --config` of a published configuration, beside what card and host could do.

    Twice: one block alone, and all of them. What the others took tells the rate; the rest is start.
    """
    from bridge.convert import read_spec
    from bridge.parameters import block_num_parameters
    from harness.probes import LONG_LENGTH

    name = f"verify --config {_STREAMED}"
    if not has_gpu():
        return not_run("stream", name, NO_GPU)
    card, config = Card.of(work), variant(_STREAMED)
    command = [*OURS, "verify", "--config", str(config), "--stream", "--device", "cuda"]
    command += ["--checks", "blocks", "--select", "long", "--json"]
    seconds: dict[str, float] = {}
    for what, more in (("one block", ["--blocks", "0"]), ("all blocks", [])):
        work.say(f"streaming {what}")
        run = work.run([*command, *more])
        evidence = run.json()
        if run.failure or evidence is None:
            return [failed("stream", name, run)]
        seconds[what] = evidence["seconds"]
    spec = read_spec(config)
    sizes = [block_num_parameters(spec, layer) for layer in range(spec.num_layers)]
    taken, walked = seconds["all blocks"] - seconds["one block"], sum(sizes[1:])
    rows = [
        card.copy_row("stream", "copy on cuda", "copy"),
        *(card.products_row("stream", kind) for kind in ("float32", "host_float64")),
    ]
    if taken <= 0:
        reason = f"all blocks took {-taken:.1f} s less than one of them: this machine is too noisy"
        return [*rows, Measurement(group="stream", name=name, status="failed", reason=reason)]
    bounds = StreamBounds.of(
        parameters=walked, tokens=LONG_LENGTH, itemsize=4, bytes_per_second=card.copy,
        flop_per_second=card.products("float32"),
        host_flop_per_second=card.products("host_float64"),
    )  # fmt: skip
    values = {
        "parameters": float(sum(sizes)),
        "parameters_per_second": walked / taken,
        "start_seconds": seconds["one block"] - sizes[0] * taken / walked,
        "share_of_bound": bounds.largest / taken,
        "share_of_copy": bounds.memory / taken,
        "share_of_matmul": bounds.products / taken,
        "share_of_host_matmul": bounds.oracle / taken,
        "peak_rss_bytes": float(run.peak_rss),
    }
    conditions = {"dtype": "float32"}
    return [
        *rows,
        Measurement(
            group="stream", name=name, conditions=conditions, samples=[run.seconds], values=values
        ),
    ]
