"""A bench whose models need not be whole: checks are answered from one walk over the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Final

from bridge.errors import BridgeError, UsageError
from bridge.tiling import Box
from harness.bench import BASE_LAYOUT, Array
from harness.block_states import BlockJudgement
from harness.localize import Localisation
from harness.oracle import Weight, read_config
from harness.probes import Probe
from harness.streaming import explain
from harness.streaming.reading import HeldRows, HeldSource
from harness.streaming.walking import WalkBench, key_of
from harness.suite import Case
from harness.toys import hf_tensors

logger = logging.getLogger(__name__)

CHECKS: Final = ("config", "logits", "blocks")
"""What any streamed model is asked."""
PAIR_CHECKS: Final = ("round_trip",)
"""And what one is that has a Megatron checkpoint to be held against, bit by bit."""
_WALKED: Final = ("logits", "blocks")


class StreamingBench(WalkBench):
    """A `Bench` for the checks `CHECKS`, and `PAIR_CHECKS` where there is a Megatron checkpoint.

    Of its fault the seams spec and code count, and rank as far as it changes code; what is changed
    in whole models once they are built has nothing to be changed in, but in resident ones.

    Where the subject is `resident`, Megatron's logits are those of whole models on ranks, in any
    layout and of any layers; the reference and the truth come from the walk.

    A subject whose `hf` is a `config.json` has synthetic weights, drawn from the subject's `seed`.

    Args:
        workdir: As `Workbench` takes it, and all further arguments.
        streaming: How.
    """

    def warm_up(self, device: str) -> None:
        """Nothing: ranks, if any, are formed after the walk."""

    def can_answer(self, case: Case) -> bool:
        """Whether the walk, or a resident model's ranks, can answer it."""
        paired = self.subject(case.model).megatron is not None
        if case.check == "blocks" and (case.layout, case.layers) != (BASE_LAYOUT, "local"):
            return False
        return case.check in CHECKS or (paired and case.check in PAIR_CHECKS)

    def prepare(self, cases: Sequence[Case]) -> None:
        """Walk once for all cases of a model, so that each is answered from what was found.

        An error is kept for the cases, each of which reports it; bad usage is one of all of them.
        """
        walked = [case for case in cases if case.check in _WALKED and self.can_answer(case)]
        for case in walked:
            names = self._probes.setdefault(key_of(case), [])
            if case.probe is not None and case.probe not in names:
                names.append(case.probe)
        self._headless |= {key_of(case) for case in walked} - {
            key_of(case) for case in walked if case.check == "logits"
        }
        for case in {key_of(case): case for case in walked}.values():
            try:
                self.outcome(case)
            except UsageError:
                raise
            except BridgeError as error:
                self._failed[key_of(case)] = error

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
            "localisation", key_of(case), case.probe,
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
