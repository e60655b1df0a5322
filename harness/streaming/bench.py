"""A bench whose models are never whole: the checks are answered from one walk over the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from bridge.convert import read_spec
from bridge.errors import BridgeError, DtypeMismatchError, UsageError
from bridge.storage.megatron import MegatronSource
from bridge.storage.safetensors import SafetensorsSource
from bridge.storage.source import TensorSource
from bridge.storage.synthetic import SyntheticSource
from bridge.tiling import Box
from harness.bench import Array, Bench
from harness.block_states import BlockJudgement
from harness.localize import Localisation
from harness.oracle import Weight, read_config
from harness.probes import Probe
from harness.report.digests import digest_of
from harness.streaming import explain
from harness.streaming.arena import Arena
from harness.streaming.cores import cores_for_each, shared_cores
from harness.streaming.megatron import DeviceName, Megatron, SegmentTilings, one_rank
from harness.streaming.progress import WalkProgress, duration
from harness.streaming.reading import HeldRows, HeldSource, ReadAhead
from harness.streaming.record import Store
from harness.streaming.reference import Reference
from harness.streaming.segments import Budget, Segment, distinct_tokens, segments_of
from harness.streaming.sides import Backend, Side
from harness.streaming.truth import Truth
from harness.streaming.walk import Held, Outcome, Sides, Walk
from harness.suite import Case
from harness.toys import hf_tensors

logger = logging.getLogger(__name__)

CHECKS: Final = ("config", "logits", "blocks")
"""What any streamed model is asked."""
PAIR_CHECKS: Final = ("round_trip",)
"""And what one is that has a Megatron checkpoint to be held against, bit by bit."""
WALK_LAYOUT: Final = "tp1-pp1"
"""Of the walk itself: this process is its only rank."""
_WALKED: Final = ("logits", "blocks")
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


class StreamingBench(Bench):
    """A `Bench` for the checks `CHECKS`, and `PAIR_CHECKS` where there is a Megatron checkpoint.

    Of its fault the seams spec and code count, and rank as far as it changes code; what is changed
    in whole models once they are built has nothing to be changed in.

    Where the subject is `resident`, Megatron's logits are those of whole models on ranks, in any
    layout and of any layers; the reference and the truth come from the walk.

    A subject whose `hf` is a `config.json` has synthetic weights, drawn from the subject's `seed`.

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

    def warm_up(self, device: str) -> None:
        """Nothing: ranks, if any, are formed after the walk."""

    def can_answer(self, case: Case) -> bool:
        """Whether a check needs neither the whole model nor a conversion of its own."""
        paired = self.subject(case.model).megatron is not None
        if case.check == "blocks" and (case.layout, case.layers) != (WALK_LAYOUT, "local"):
            return False
        return case.check in CHECKS or (paired and case.check in PAIR_CHECKS)

    def prepare(self, cases: Sequence[Case]) -> None:
        """Walk once for all cases of a model, so that each is answered from what was found.

        An error is kept for the cases, each of which reports it; bad usage is one of all of them.
        """
        walked = [case for case in cases if case.check in _WALKED and self.can_answer(case)]
        for case in walked:
            names = self._probes.setdefault(_key(case), [])
            if case.probe is not None and case.probe not in names:
                names.append(case.probe)
        self._headless |= {_key(case) for case in walked} - {
            _key(case) for case in walked if case.check == "logits"
        }
        for case in {_key(case): case for case in walked}.values():
            try:
                self.outcome(case)
            except UsageError:
                raise
            except BridgeError as error:
                self._failed[_key(case)] = error

    def outcome(self, case: Case) -> Outcome:
        """What the walk over the case's model has found, on every probe of the run."""
        if _key(case) in self._failed:
            raise self._failed[_key(case)]
        names = self._probes.setdefault(_key(case), [case.probe or "long"])
        if case.probe is not None and case.probe not in names:
            names.append(case.probe)
        return self._once("walk", _key(case), tuple(names), make=lambda: self._walk(case, names))

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

    # What the checks ask for

    def block_judgements(self, case: Case) -> list[BlockJudgement]:
        """The embedding and every block that was walked through, judged."""
        return self.outcome(case).record.judgements[self._probe_name(case)]

    def reference_logits(self, case: Case, name: str | None = None) -> Array:
        """The Hugging Face model's, free-running."""
        del name
        return self.outcome(case).logits[self._probe_name(case)].reference

    def megatron_logits(self, case: Case, *, layout: str | None = None) -> Array:
        """Megatron-Core's, free-running; on ranks where whole models are asked for."""
        if self._is_resident(case):
            self.outcome(case)  # first: it needs the memory that the models then take
            return super().megatron_logits(case, layout=layout)
        return self.outcome(case).logits[self._probe_name(case)].ours

    def oracle_logits(self, case: Case, probe: Probe | None = None) -> Array:
        """The truth."""
        del probe
        return self.outcome(case).logits[self._probe_name(case)].truth

    def oracle_weight(self, case: Case) -> Weight:
        """The weights by name, read when they are wanted."""
        shapes = hf_tensors(read_config(self.config(case)))
        source = HeldSource(self._source(case), [])
        return lambda name: HeldRows(source, name, Box.whole(shapes[name]))

    def stored_sizes(self, case: Case) -> list[int]:
        """Elements of each tensor that the source holds."""
        if self.checkpoint(case).is_dir():
            return super().stored_sizes(case)
        return [math.prod(shape) for shape in hf_tensors(read_config(self.config(case))).values()]

    def localisation(self, case: Case) -> Localisation:
        """Where and why the case's model goes wrong, from what the walk has kept."""
        if self._is_resident(case):
            return Localisation(places=("not localised: only the walk has looked at blocks",))
        return self._once(
            "localisation", _key(case), case.probe,
            make=lambda: explain.localise(
                self.outcome(case),
                probe=self.probe(case),
                model=read_config(self.truth_config(case)),
                weight=self.oracle_weight(case),
                mapping=self._mapping(case, None),
                segments=self._segments(case)[0],
                dtype=case.dtype,
                thresholds=self.limits(case),
            ),
        )  # fmt: skip

    def _is_resident(self, case: Case) -> bool:
        return self.subject(case.model).streamed == "resident"

    def _probe_name(self, case: Case) -> str:
        return case.probe or "long"

    # The walk

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
        names = self._probes[_key(case)]
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
            head=_key(case) not in self._headless,
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


def _key(case: Case) -> tuple[str, str, str]:
    return case.model, case.dtype, case.device


def _side(
    backend: Backend,
    probes: Sequence[Probe],
    vocab_size: int,
    dtype: type[np.floating[Any]] = np.float32,
) -> Side:
    return Side(backend, probes, vocab_size=vocab_size, logits_dtype=dtype)
