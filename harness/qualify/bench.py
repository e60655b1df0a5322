"""One bench for a model that is walked through and a twin that is whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.bench import Bench
from harness.streaming.bench import StreamingBench
from harness.streaming.walking import Streaming
from harness.suite import Case


class QualifyingBench(Bench):
    """A `Bench` that leaves to a walk what can be answered of a subject that is `streamed`.

    The walk begins when its first answer is asked for, so that what is cheap has been tried before.

    Args:
        workdir: As `Workbench` takes it, and all further arguments.
        streaming: How models are walked through.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        streaming: Streaming,
        **options: Any,  # noqa: ANN401 - Workbench's
    ) -> None:
        super().__init__(workdir, **options)
        self._walk = StreamingBench(workdir, streaming=streaming, **options)
        self._waiting: list[Case] = []

    def answering(self, case: Case) -> Bench:
        """The walk, for a case that it can answer; this bench for any other."""
        if not self._is_walked(case):
            return self
        waiting, self._waiting = self._waiting, []
        self._walk.prepare(waiting)
        return self._walk

    def prepare(self, cases: Sequence[Case]) -> None:
        """Remember what the walk will be asked, so that one pass answers it all."""
        self._waiting = [case for case in cases if self._is_walked(case)]

    def _is_walked(self, case: Case) -> bool:
        return self.subject(case.model).streamed != "no" and self._walk.can_answer(case)

    def __exit__(self, *error: object) -> None:
        """Forget the states of a walk that has ended, unless its results may yet be lost."""
        self._walk.__exit__(*error)
        super().__exit__(*error)
