"""A qualification before it runs: what was asked for, held against what there is."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge.console import gib, parse_size
from bridge.dtypes import dtype_named
from bridge.errors import InconsistentConfigError, UsageError
from bridge.family import FAMILY
from bridge.hf_config import CONFIG_NAME, config_file, load_hf_config, spec_from_hf_config
from bridge.hub import resolve_here
from bridge.parameters import num_parameters
from bridge.plan import ranges
from harness.inputs import account_for_hf, account_for_megatron
from harness.oracle import read_config
from harness.probes import probes
from harness.qualify.origin import Origin, origin_of
from harness.qualify.scope import Choices, Scope, scope_of
from harness.qualify.suites import Variant, load_variant
from harness.streaming.segments import distinct_tokens, segments_of
from harness.suite import PROBES
from harness.toys import toy_named
from harness.workbench import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command was given, as far as it says what is qualified.

    Args:
        hf_model: Directory, `config.json` or Hub id.
        config: A configuration in its place.
        suite: A variant whose configuration is taken where neither is given.
        revision: Of a Hub id.
        megatron: A checkpoint to be held against the model.
        full: Every block at real dimensions.
        seed: Of pseudo-random weights.
        dtype: What to compute in.
        device: Where.
        faults: Patterns of a trial that is not whole.
        hf_id: For the card.
        hf_revision: For the card.
        base_container: For the card.
    """

    hf_model: str | None
    config: Path | None
    suite: str | None
    revision: str | None
    megatron: Path | None
    full: bool
    seed: int
    dtype: str
    device: str
    faults: tuple[str, ...]
    hf_id: str | None
    hf_revision: str | None
    base_container: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is run.

    Args:
        scope: All that follows from the configuration.
        path: The checkpoint, or the configuration alone.
        megatron: The checkpoint that is held against it.
        origin: Whose weights, by which code.
        config: The configuration, byte for byte, as it was when it was read.
    """

    scope: Scope
    path: Path
    megatron: Path | None
    origin: Origin
    config: bytes

    def subjects(self, twin: Path) -> dict[str, Subject]:
        """The models under test, by name.

        Args:
            twin: Where the twin's checkpoint is.
        """
        choices = self.scope.choices
        model = Subject(
            name=choices.name,
            hf=self.path,
            megatron=self.megatron,
            seed=choices.seed,
            blocks=self.scope.blocks,
            streamed="walk",
        )
        small = Subject(name=self.scope.twin.toy.name, hf=twin)
        return {one.name: one for one in (small, model)}


def job_of(request: Request, scratch: Path) -> Job:
    """Find the model, read it, derive what is to be run; nothing is computed yet.

    Args:
        request: What was asked for.
        scratch: Where the configuration of a stand-in is written.

    Raises:
        UsageError: BR001, no model or two of them.
        ConfigError: BR1xx, a model that cannot be converted or cannot be proved.
        CheckpointError: BR3xx, weights that are not those of the configuration.
        SuiteError: HN101, no such variant.
    """
    variant = None if request.suite is None else load_variant(request.suite)
    if request.hf_model is not None and request.config is not None:
        raise UsageError("give either --hf-model, or --config for a configuration without weights")
    if request.revision is not None and request.hf_model is None:
        raise UsageError("--revision is of a Hub id, which only --hf-model takes")
    path, stand_in = _found(request, variant, scratch)
    if request.megatron is not None and not path.is_dir():
        raise UsageError(
            "a configuration has no weights to hold --megatron-path against",
            hint="give --hf-model with the checkpoint's directory",
        )
    origin = origin_of(
        request.hf_model, path,
        hf_id=request.hf_id or (None if variant is None else variant.hf_id),
        hf_revision=request.hf_revision, base_container=request.base_container,
    )  # fmt: skip
    if variant is not None and request.hf_id not in (None, variant.hf_id):
        raise UsageError(
            f"--suite {variant.name} is {variant.hf_id}, --hf-id says {request.hf_id}",
            hint="leave one of them away",
        )
    parsed = load_hf_config(path)
    config = config_file(path).read_bytes()
    scope = scope_of(
        parsed,
        Choices(
            name=_name(path, request, variant, origin),
            weights="checkpoint" if path.is_dir() else "synthetic",
            paired=request.megatron is not None,
            full=request.full,
            seed=request.seed,
            dtype=request.dtype,
            device=request.device,
            faults=request.faults,
            stand_in=stand_in,
        ),
        where=str(config_file(path)),
    )
    known = {one.hub_id: one.num_parameters for one in FAMILY} | (
        {} if variant is None else {variant.hf_id: variant.num_parameters}
    )
    if origin.hf_id is not None and stand_in is None:
        _published(scope, origin.hf_id, known.get(origin.hf_id), path)
    if path.is_dir():
        account_for_hf(path)
    if request.megatron is not None:
        account_for_megatron(request.megatron, scope.spec)
    return Job(scope=scope, path=path, megatron=request.megatron, origin=origin, config=config)


def _found(request: Request, variant: Variant | None, scratch: Path) -> tuple[Path, str | None]:
    """Where the model is, and what it stands in for."""
    if request.config is not None:
        return config_file(request.config), None
    if request.hf_model is not None:
        return resolve_here(request.hf_model, weights=True, revision=request.revision), None
    if variant is None:
        raise UsageError(
            "no model to qualify",
            hint="give --hf-model, or --config for a configuration without weights, or --suite",
        )
    if variant.config is not None:
        return variant.config, None
    toy = toy_named(variant.stand_in or "")
    path = scratch / CONFIG_NAME
    path.write_text(json.dumps(toy.config, indent=1) + "\n", "utf-8")
    return path, toy.stands_for


def _name(path: Path, request: Request, variant: Variant | None, origin: Origin) -> str:
    given = request.hf_model is not None or request.config is not None
    if variant is not None:
        return variant.name if given or variant.config else f"{variant.name}-stand-in"
    if origin.hf_id is not None and request.config is None:
        return origin.hf_id.partition("/")[2]
    place = path.resolve()
    if place.is_dir():
        return place.name
    return place.parent.name if place.name == CONFIG_NAME else place.stem


def _published(scope: Scope, hf_id: str, published: int | None, path: Path) -> None:
    """See that a configuration is that of a known model, as far as its size tells."""
    found = num_parameters(scope.spec)
    if published not in (None, found):
        raise InconsistentConfigError(
            f"this is not {hf_id}: {found:,} parameters, {published:,} are published",
            where=str(path),
            hint="leave --suite and --hf-id away to qualify a model of its own",
        )


def look(job: Job, *, memory_budget: str, workdir: Path | None) -> str:
    """See that there is room for it; what will be done, in words.

    Raises:
        UsageError: BR001, a memory budget or a disk that is too small, said before any work.
    """
    scope, choices = job.scope, job.scope.choices
    config = load_hf_config(job.path)
    wanted = [
        one
        for one in probes(
            scope.spec.vocab_size, max_position_embeddings=scope.spec.max_position_embeddings
        )
        if one.name in PROBES
    ]
    stored = dtype_named(scope.spec.params_dtype).itemsize
    segments, _ = segments_of(
        read_config(config),
        distinct_tokens([one.input_ids for one in wanted]),
        memory_budget=parse_size(memory_budget),
        word=stored * (2 if choices.paired else 1),
        element=dtype_named(choices.dtype).itemsize,
        blocks=scope.blocks,
    )
    total = num_parameters(scope.spec)
    if choices.weights == "checkpoint" and not choices.paired:
        _refuse_full_disk(2 * total * stored, workdir)
    small = num_parameters(spec_from_hf_config(scope.twin_config))
    walked = sum(one.num_parameters for one in segments)
    chosen = range(scope.spec.num_layers) if scope.blocks is None else scope.blocks
    return (
        f"{choices.name}: {total:,} parameters in {scope.spec.num_layers} blocks\n"
        f"  at real dimensions: {walked:,} of them, blocks {ranges(chosen)}\n"
        f"  on a twin of {len(scope.twin.layer_idx)} blocks, {small:,} parameters: "
        f"{_cases(scope)} cases over {', '.join(scope.layouts)}; {len(scope.faults)} faults"
    )


def _cases(scope: Scope) -> int:
    return sum(case.model == scope.twin.toy.name for case in scope.cases)


def _refuse_full_disk(needed: int, workdir: Path | None) -> None:
    place = workdir or Path(tempfile.gettempdir())
    exists: Sequence[Path] = [one for one in (place, *place.absolute().parents) if one.exists()]
    free = shutil.disk_usage(exists[0]).free
    if free < needed:
        raise UsageError(
            f"converting the model there and back takes {gib(needed)}, {gib(free)} are free",
            where=str(place),
            hint="give --workdir where there is room, or --megatron-path with a conversion that "
            "you have made, which is then compared bit by bit",
        )
