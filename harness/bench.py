"""What the cases of a run hold against each other: the numbers of three implementations."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from bridge.errors import BridgeError
from bridge.platform import forbid_tf32
from harness import block_states, live, localize
from harness.block_states import BlockJudgement, Witnesses
from harness.compare import oracle_weights
from harness.cores import oracle_cores
from harness.detached import DetachedReference
from harness.errors import ReferenceUnavailableError
from harness.generation import Generated, hf_greedy, prompts_of
from harness.gradients import ReferenceGradients, hf_loss_and_gradients
from harness.live_blocks import Gathered
from harness.localize import Localisation
from harness.oracle import POWERS, Weight, forward, read_config
from harness.oracle_gradients import LossAndGradients, loss_and_gradients
from harness.probes import CONTEXT_LENGTHS, Probe
from harness.reference import (
    attention_for,
    float32_powers,
    hf_inv_freq,
    hf_logits,
    load_hf_model,
)
from harness.suite import Case
from harness.workbench import BASE_LAYOUT, Subject, Workbench

__all__ = ["BASE_LAYOUT", "Array", "Bench", "Subject"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]


class Bench(Workbench):
    """Shared work of a run; see `Workbench` for its arguments."""

    def answering(self, case: Case) -> Bench:
        """The bench that a case is run on: this one, unless part of the work is another's."""
        del case
        return self

    def detached(self, case: Case, name: str | None = None) -> DetachedReference | None:
        """The file that stands for the reference on the case's probe, or another by name."""
        wanted = name or case.probe or "long"
        found = self.subject(case.model).references.get(wanted)
        return found if found is None or found.provenance.dtype == case.dtype else None

    def reference_logits(self, case: Case, name: str | None = None) -> Array:
        """What the Hugging Face model makes of a probe, (batch, seq, vocab_size).

        Raises:
            ReferenceUnavailableError: HN204, see `hf_model`.
        """
        detached = self.detached(case, name)
        if detached is not None:
            return detached.logits
        path, probe = self.checkpoint(case), self.probe(case, name)

        def compute() -> Array:
            logger.info("reference logits of %s in %s", case.model, case.dtype)
            return hf_logits(self.hf_model(case), probe.input_ids, probe.position_ids)

        return self._once(
            "reference", path, case.dtype, case.device, probe.name, make=compute,
            spoilt=self.fault.reference is not None,
        )  # fmt: skip

    def reference_inv_freq(self, case: Case) -> Array:
        """The rotary frequencies of the Hugging Face model, (kv_channels / 2,), float32.

        Raises:
            ReferenceUnavailableError: HN204, see `hf_model`.
        """
        found = self.detached_inv_freq(case)
        if found is None:
            found = hf_inv_freq(self.hf_model(case))
        return np.empty(0, np.float32) if found is None else found

    def detached_inv_freq(self, case: Case) -> Array | None:
        """The same from a file that stands for the reference; None without one that has them."""
        for name in self.subject(case.model).references:
            detached = self.detached(case, name)
            if detached is not None and detached.provenance.inv_freq is not None:
                return detached.provenance.inv_freq
        return None

    def reference_attention(self, case: Case) -> str:
        """The name of the attention that the live Hugging Face model has on the case's probe."""
        return attention_for(CONTEXT_LENGTHS.get(case.probe or "", 0))

    def hf_model(self, case: Case) -> Any:  # noqa: ANN401 - transformers is not typed
        """The live Hugging Face model in the case's dtype; whoever hooks into it takes it out.

        Raises:
            ReferenceUnavailableError: HN204, it cannot be had, and the user has brought logits
                from where it can.
        """
        path, subject = self.checkpoint(case), self.subject(case.model)
        attention = self.reference_attention(case)

        def load() -> Any:  # noqa: ANN401 - as above
            try:
                found = load_hf_model(
                    path,
                    dtype=case.dtype,
                    trust_remote_code=subject.trust_remote_code,
                    carry=subject.carry,
                    attention=attention,
                )
            except (BridgeError, ImportError, OSError, RuntimeError, ValueError) as error:
                if not subject.references:
                    raise
                raise ReferenceUnavailableError(
                    f"the reference model cannot be run here: {str(error).splitlines()[0]}",
                    where=str(path),
                    hint="what needs the model itself, and not its logits, is not checked",
                ) from error
            if case.device == "cuda":
                forbid_tf32()
                found = found.to("cuda")  # dtypes stay: rotary frequencies are float32 always
            if self.fault.reference is not None:
                self.fault.reference(found)
            return found

        return self._once(
            "hf model", path, case.dtype, case.device, attention, make=load,
            spoilt=self.fault.reference is not None,
        )  # fmt: skip

    def oracle_config(self, case: Case) -> dict[str, Any]:
        """The configuration as the oracle is given it."""
        config = self.config(case)
        return config if self.fault.oracle is None else self.fault.oracle(config)

    def truth_config(self, case: Case) -> dict[str, Any]:
        """The same with torch's float32 powers, where those of this head size are an ulp off.

        That ulp is part of what the models are; records, which outlast a library, do without it.
        """
        config = self.oracle_config(case)
        model = read_config(config)
        powers = float32_powers(model.rope.base, model.kv_channels)
        return config if powers is None else config | {POWERS: powers}

    def oracle_weight(self, case: Case) -> Weight:
        """The weights by name, as the oracle wants them."""
        path = self.checkpoint(case)
        found: Weight = oracle_weights(path)
        return found

    def oracle_logits(self, case: Case, probe: Probe | None = None) -> Array:
        """The truth on the case's probe: (batch, seq, vocab_size), float64.

        A probe that is given is that of a record, and so is the configuration.
        """
        path = self.checkpoint(case)
        config = self.truth_config(case) if probe is None else self.oracle_config(case)
        probe = probe or self.probe(case)

        def compute() -> Array:
            logger.info("oracle logits of %s, %s probe", case.model, probe.name)
            with oracle_cores():
                return forward(
                    config,
                    self.oracle_weight(case),
                    probe.input_ids,
                    probe.position_ids,
                )

        return self._once(
            "oracle", path, probe.name, make=compute, spoilt=self.fault.oracle is not None
        )

    def generated(self, case: Case) -> Generated:
        """What the Hugging Face model goes on to say, decoding with its cache."""
        path = self.checkpoint(case)
        return self._once(
            "generated", path, case.dtype, case.device,
            make=lambda: hf_greedy(self.hf_model(case), prompts_of(self.probe(case, "short"))),
            spoilt=self.fault.reference is not None,
        )  # fmt: skip

    def oracle_continuation(self, case: Case, generated: Generated) -> Array:
        """The truth on every step along chosen tokens: (batch, num_steps, vocab_size)."""
        path, steps = self.checkpoint(case), generated.tokens.shape[1]
        tokens = np.concatenate([generated.prompts, generated.tokens[:, :-1]], axis=1)

        def compute() -> Array:
            positions = np.arange(tokens.shape[1])
            config, weight = self.truth_config(case), self.oracle_weight(case)
            with oracle_cores():
                return forward(config, weight, tokens, positions)[:, -steps:]

        return self._once(
            "oracle continuation", path, tokens.tobytes(), make=compute,
            spoilt=self.fault.oracle is not None,
        )  # fmt: skip

    def reference_gradients(self, case: Case) -> ReferenceGradients:
        """What the Hugging Face model makes of the short probe, forward and back."""
        path, probe = self.checkpoint(case), self.probe(case, "short")

        def compute() -> ReferenceGradients:
            logger.info("reference gradients of %s in %s", case.model, case.dtype)
            return hf_loss_and_gradients(self.hf_model(case), probe.input_ids, probe.position_ids)

        return self._once(
            "reference gradients", path, case.dtype, case.device, probe.name, make=compute,
            spoilt=self.fault.reference is not None,
        )  # fmt: skip

    def oracle_gradients(self, case: Case) -> LossAndGradients:
        """The true loss and gradients on the short probe, float64."""
        path, probe = self.checkpoint(case), self.probe(case, "short")

        def compute() -> LossAndGradients:
            logger.info("oracle gradients of %s, %s probe", case.model, probe.name)
            with oracle_cores():
                return loss_and_gradients(
                    self.truth_config(case),
                    self.oracle_weight(case),
                    probe.input_ids,
                    probe.position_ids,
                )

        return self._once(
            "oracle gradients", path, probe.name, make=compute,
            spoilt=self.fault.oracle is not None,
        )  # fmt: skip

    def witnesses(self, case: Case) -> Witnesses:
        """The reference's and the oracle's state after every block, on the case's probe."""
        return self._once(
            "witnesses", self.checkpoint(case), case.dtype, case.device, case.probe,
            make=lambda: block_states.witnesses(case, self),
            spoilt=self.fault.reference is not None or self.fault.oracle is not None,
        )  # fmt: skip

    def block_states(self, case: Case) -> Gathered:
        """Megatron's state after every block, on the case's probe; forced by the reference's."""
        return self._once(
            "block states", self.request(case), case.probe,
            make=lambda: block_states.megatron_states(case, self),
            spoilt=self.spoils_ranks or self.spoils("reference"),
        )  # fmt: skip

    def megatron_logits(self, case: Case, *, layout: str | None = None) -> Array:
        """Megatron-Core's logits on the case's probe, (batch, seq, vocab_size)."""
        request, probe = self.request(case, layout=layout), self.probe(case)

        def compute() -> Array:
            found: list[Array] = self.run(
                case, request.layout, live.logits, request, probe.input_ids, probe.position_ids
            )
            return found[0]

        return self._once("logits", request, probe.name, make=compute, spoilt=self.spoils_ranks)

    def counting_difference(self, case: Case) -> float:
        """How far Megatron's logits move when it counts positions instead of being told them.

        Only where the case's probe counts from 0. Infinity for a NaN.
        """
        request, probe = self.request(case), self.probe(case)
        ranks: list[Array] = self.run(
            case, request.layout, live.logits, request, probe.input_ids, None
        )
        difference = float(np.abs(ranks[0] - self.megatron_logits(case)).max())
        return math.inf if math.isnan(difference) else difference

    def block_judgements(self, case: Case) -> list[BlockJudgement]:
        """The embedding and every block of Megatron on the case's probe, judged."""
        return block_states.judge_blocks(
            self.block_states(case), self.witnesses(case),
            dtype=case.dtype, thresholds=self.limits(case),
        )  # fmt: skip

    def localisation(self, case: Case) -> Localisation:
        """Where and why the case's model goes wrong, on its layout and probe."""
        return self._once(
            "localisation", self.request(case), case.probe,
            make=lambda: localize.localise(case, self),
        )  # fmt: skip
