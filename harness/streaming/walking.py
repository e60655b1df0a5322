"""How a walk is set up: where weights come from, the three sides, what is kept to go on from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from bridge.convert import read_spec
from bridge.errors import BridgeError, DtypeMismatchError
from bridge.storage.megatron import MegatronSource
from bridge.storage.safetensors import SafetensorsSource
from bridge.storage.source import TensorSource
from bridge.storage.synthetic import SyntheticSource
from harness.bench import Bench
from harness.cores import cores_for_each, shared_cores
from harness.oracle import read_config
from harness.probes import Probe
from harness.report.digests import digest_of
from harness.streaming.arena import Arena
from harness.streaming.megatron import DeviceName, Megatron, SegmentTilings, one_rank
from harness.streaming.progress import WalkProgress, duration
from harness.streaming.reading import ReadAhead
from harness.streaming.record import Store
from harness.streaming.reference import Reference
from harness.streaming.segments import Budget, Segment, distinct_tokens, segments_of
from harness.streaming.sides import Backend, Side
from harness.streaming.truth import Truth
from harness.streaming.walk import Held, Outcome, Sides, Walk
from harness.suite import Case

logger = logging.getLogger(__name__)

DEFAULT_BUDGET: Final = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """How a model is streamed.

    Args:
        memory_budget: Bytes for weights, read or being computed with.
        threads: That read ahead, and as many for the oracle; None lets the machine decide, see
            `cores`.
        keep: Where states are kept after each block.
        resume: Go on from what is kept there.
        quiet: No progress on stderr.
    """

    memory_budget: int = DEFAULT_BUDGET
    threads: int | None = None
    keep: Path | None = None
    resume: bool = False
    quiet: bool = False


class WalkBench(Bench):
    """A `Bench` that walks through models; what checks are told of it is for `StreamingBench`.

    Args:
        workdir: As `Workbench` takes it, and all further arguments.
        streaming: How.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        streaming: Streaming = Streaming(),
        **options: Any,  # noqa: ANN401 - Workbench's
    ) -> None:
        super().__init__(workdir, **options)
        self._streaming = streaming
        self._probes: dict[tuple[str, str, str], list[str]] = {}
        self._failed: dict[tuple[str, str, str], BridgeError] = {}
        self._headless: set[tuple[str, str, str]] = set()
        self._finished: list[Store] = []
        self._sources: list[TensorSource] = []

    def outcome(self, case: Case) -> Outcome:
        """What the walk over the case's model has found, on every probe of the run."""
        if key_of(case) in self._failed:
            raise self._failed[key_of(case)]
        names = self._probes.setdefault(key_of(case), [case.probe or "long"])
        if case.probe is not None and case.probe not in names:
            names.append(case.probe)
        return self._once("walk", key_of(case), tuple(names), make=lambda: self._walk(case, names))

    def __exit__(self, *error: object) -> None:
        """Forget the states of walks that have ended, unless their results may yet be lost."""
        if error[0] is None:
            for store in self._finished:
                store.forget()
        super().__exit__(*error)

    def close(self) -> None:
        """Close what was read from, too."""
        for source in self._sources:
            source.close()
        super().close()

    def _source(self, case: Case) -> TensorSource:
        path = self.checkpoint(case)

        def make() -> TensorSource:
            if path.is_dir():
                return SafetensorsSource(path)
            subject = self.subject(case.model)
            # Not `self.spec`, which a fault may have changed: the weights are the model's own.
            return SyntheticSource(
                read_spec(path, carry=subject.carry),
                seed=subject.seed,
                device="cuda" if case.device == "cuda" else None,
            )

        return self._opened("source", path, case.device, make=make)

    def _opened(self, *key: object, make: Callable[[], TensorSource]) -> TensorSource:
        def opened() -> TensorSource:
            self._sources.append(make())
            return self._sources[-1]

        return self._once(*key, make=opened)

    def _mapping(self, case: Case, checkpoint: TensorSource | None) -> SegmentTilings:
        with self.fault.changed_code():
            return SegmentTilings(self.spec(case), checkpoint)

    def _megatron_source(self, case: Case) -> TensorSource | None:
        path = self.subject(case.model).megatron
        if path is None:
            return None
        return self._opened("megatron source", path, make=lambda: MegatronSource(path))

    def _segments(self, case: Case) -> tuple[list[Segment], Budget]:
        names = self._probes[key_of(case)]
        probes = [self.probe(case, name) for name in names]
        kinds = {one.dtype for one in self._source(case).tensors.values()}
        odd = [one.name for one in kinds if not one.is_floating]
        if odd:
            raise DtypeMismatchError(
                f"weights of {', '.join(odd)} cannot be computed with",
                where=str(self.checkpoint(case)),
                hint="dequantize the checkpoint first",
            )
        return segments_of(
            read_config(self.config(case)),
            distinct_tokens([one.input_ids for one in probes]),
            memory_budget=self._streaming.memory_budget,
            word=sum(self._word_sizes(case)),
            element=getattr(torch, case.dtype).itemsize,
            blocks=self.subject(case.model).blocks,
            head=key_of(case) not in self._headless,
        )

    def _word_sizes(self, case: Case) -> list[int]:
        """Bytes of a stored element, on the Hugging Face side and in a Megatron checkpoint."""
        sources = [self._source(case), self._megatron_source(case)]
        return [max(info.dtype.itemsize for info in one.tensors.values()) for one in sources if one]

    def _walk(self, case: Case, names: Sequence[str]) -> Outcome:
        probes = [self.probe(case, name) for name in names]
        segments, budget = self._segments(case)
        other = self._megatron_source(case)
        device: DeviceName = "cuda" if case.device == "cuda" else "cpu"
        dtype: torch.dtype = getattr(torch, case.dtype)
        with ExitStack() as stack:
            stack.enter_context(shared_cores(device))
            where = stack.enter_context(one_rank(device))
            arena = Arena(budget.module // dtype.itemsize, dtype=dtype, device=where)
            mapping = self._mapping(case, other)
            model = read_config(self.truth_config(case))
            truth = Truth(model, threads=self._streaming.threads or cores_for_each(device))
            stack.callback(truth.close)
            reference = Reference(self.config(case), dtype=dtype, arena=arena, device=where)
            megatron = Megatron(
                self.spec(case), mapping, dtype=case.dtype, arena=arena, device=device,
                fault=self.fault,
            )  # fmt: skip
            walk = Walk(
                model=model,
                segments=segments,
                probes=probes,
                sides=Sides(
                    truth=_side(truth, probes, model.vocab_size, np.float64),
                    reference=_side(reference, probes, model.vocab_size),
                    ours=_side(megatron, probes, model.vocab_size),
                ),
                dtype=case.dtype,
                thresholds=self.limits(case),
                store=self._store(case, probes),
            )
            first = walk.begin()
            done = sum(one.num_parameters for one in segments[:first])
            total = sum(one.num_parameters for one in segments)
            if not self._streaming.quiet:
                progress = stack.enter_context(WalkProgress(total, done))
                walk.advance = progress.advance
            held = stack.enter_context(
                self._held(case, segments[first:], budget, mapping if other else None, other)
            )
            found = walk.run(held, first=first)
        if device == "cuda":
            del arena, reference, megatron, walk.sides
            torch.cuda.empty_cache()  # ranks are other processes
        if walk.store is not None:
            self._finished.append(walk.store)
        spent = ", ".join(f"{what} {duration(count)}" for what, count in found.seconds.items())
        logger.info("%s streamed: %.2f billion parameters; %s", case.model, total / 1e9, spent)
        return found

    @contextmanager
    def _held(
        self,
        case: Case,
        segments: Sequence[Segment],
        budget: Budget,
        mapping: SegmentTilings | None,
        other: TensorSource | None,
    ) -> Iterator[Held]:
        """The weights of each segment, read ahead."""
        # A GPU makes synthetic weights by itself; more threads would only take turns to ask it.
        made_there = case.device == "cuda" and not self.checkpoint(case).is_dir()
        threads = self._streaming.threads or (1 if made_there else cores_for_each())
        sizes = self._word_sizes(case)
        shares = [budget.words * one // sum(sizes) for one in sizes]
        with ExitStack() as stack:
            weights = stack.enter_context(
                ReadAhead(
                    self._source(case),
                    [segment.boxes for segment in segments],
                    max_nbytes=shares[0],
                    threads=threads,
                    pinned=case.device == "cuda",
                )
            )
            if other is None or mapping is None:
                yield ((one, one) for one in weights)
                return
            theirs = stack.enter_context(
                ReadAhead(
                    other,
                    [mapping.wanted(segment) for segment in segments],
                    max_nbytes=shares[1],
                    threads=threads,
                    pinned=case.device == "cuda",
                )
            )
            yield zip(weights, theirs, strict=True)

    def _store(self, case: Case, probes: Sequence[Probe]) -> Store | None:
        if self._streaming.keep is None:
            return None
        subject = self.subject(case.model)
        identity = {
            "model": case.model,
            "config": digest_of(self.config(case)),
            "seed": subject.seed,
            "blocks": subject.blocks,
            "dtype": case.dtype,
            "device": case.device,
            "budget": self._streaming.memory_budget,
            "probes": {
                one.name: digest_of([one.input_ids.tolist(), one.position_ids.tolist()])
                for one in probes
            },
        }
        store = Store(self._streaming.keep, identity)
        if not self._streaming.resume:
            store.forget()
        return store


def key_of(case: Case) -> tuple[str, str, str]:
    """Of what there is one walk: all its probes and layouts."""
    return case.model, case.dtype, case.device


def _side(
    backend: Backend,
    probes: Sequence[Probe],
    vocab_size: int,
    dtype: type[np.floating[Any]] = np.float32,
) -> Side:
    return Side(backend, probes, vocab_size=vocab_size, logits_dtype=dtype)
