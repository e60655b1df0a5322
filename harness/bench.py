"""What the cases of a run share, made once: checkpoints, conversions, reference and oracle logits.

Everything here is lazy and cached by what it depends on, so a single selected case costs only its
own inputs, and a whole suite computes each reference once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

import numpy as np

from bridge.conversion import ConversionOptions
from bridge.convert import export_checkpoint, import_checkpoint, read_spec
from bridge.errors import BridgeError, ConfigError
from bridge.hf_config import load_hf_config
from bridge.spec import ModelSpec, ParallelLayout
from harness import block_states, coded, live, localize
from harness.block_states import Witnesses
from harness.compare import oracle_weights, read_safetensors
from harness.detached import DetachedReference
from harness.errors import ReferenceUnavailableError
from harness.generation import Generated, hf_greedy, prompts_of
from harness.golden import cases as golden_cases
from harness.golden.tensors import describe_tensors
from harness.gradients import ReferenceGradients, hf_loss_and_gradients
from harness.hooks import HEALTHY, Fault
from harness.launcher import DEFAULT_TIMEOUT, RankPool
from harness.layouts import resolve_layout
from harness.live import ModelRequest
from harness.live_blocks import Gathered
from harness.localize import Localisation
from harness.logits_file import as_probe, read_input
from harness.oracle import Weight, forward
from harness.oracle_gradients import LossAndGradients, loss_and_gradients
from harness.probes import INPUT_PROBE, Probe, probe_named
from harness.ranks import RankFunction
from harness.reference import hf_inv_freq, hf_logits, load_hf_model
from harness.suite import Case
from harness.thresholds import Thresholds, load_thresholds
from harness.toys import toy_named, write_checkpoint

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]
_Value = TypeVar("_Value")
BASE_LAYOUT: Final = "tp1-pp1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model under test: a toy, or a user's checkpoint.

    Args:
        name: As in case ids.
        hf: Its Hugging Face checkpoint; None for a toy, which is written when it is needed.
        megatron: A Megatron checkpoint to be held against it, where the user has one.
        trust_remote_code: Run the checkpoint's own code as the reference.
        carry: Unknown fields of its configuration that the user lets through.
        input: A file of tokens that is the probe `input`.
        references: Probe to logits that were computed elsewhere, in the dtype of the run. With any
            of them, a reference model that cannot be run here is no error.
    """

    name: str
    hf: Path | None = None
    megatron: Path | None = None
    trust_remote_code: bool = False
    carry: tuple[str, ...] = ()
    input: Path | None = None
    references: Mapping[str, DetachedReference] = field(default_factory=dict, compare=False)


class Bench:
    """Shared work of a run.

    Args:
        workdir: An empty directory for toys and conversions.
        subjects: Models under test besides the toys, by name.
        fault: A deliberate mistake; `HEALTHY` for a run that checks the bridge.
        timeout: Seconds one case may keep the ranks busy.
        log_dir: Where ranks log; None for a private directory.
        thresholds: Limits; None for `suites/thresholds.toml`.
        healthy: A bench without a fault, whose ranks and whatever the fault does not touch are
            used; see `under`.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        subjects: Mapping[str, Subject] | None = None,
        fault: Fault = HEALTHY,
        timeout: float = DEFAULT_TIMEOUT,
        log_dir: Path | None = None,
        thresholds: Thresholds | None = None,
        healthy: Bench | None = None,
    ) -> None:
        self.workdir = workdir
        self._healthy = healthy
        self.localises: bool = healthy is None or healthy.localises
        """Whether failed parity is explained; thousands of deliberate failures need not be."""
        self.subjects = dict(subjects or {})
        self.fault = fault
        self.timeout = timeout
        self.log_dir = log_dir
        self.thresholds = thresholds or load_thresholds()
        self._made: dict[tuple[object, ...], Any] = {}
        self._pools: dict[str, RankPool] = {} if healthy is None else healthy._pools  # noqa: SLF001 - its own class

    def under(self, fault: Fault) -> Bench:
        """The same bench with a fault: it shares ranks, and all that the fault leaves alone.

        It lives no longer than this one, and is not to be closed.
        """
        return Bench(
            self.workdir, subjects=self.subjects, fault=fault, timeout=self.timeout,
            log_dir=self.log_dir, thresholds=self.thresholds, healthy=self,
        )  # fmt: skip

    def beside(self, workdir: Path, subjects: Mapping[str, Subject]) -> Bench:
        """A bench for other models, with the same fault, on the same ranks.

        What it makes is forgotten with it. It lives no longer than this one, and is not to be
        closed.
        """
        found = Bench(
            workdir, subjects=subjects, fault=self.fault, timeout=self.timeout,
            log_dir=self.log_dir, thresholds=self.thresholds,
        )  # fmt: skip
        found._pools = self._pools
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the rank processes. The working directory is the caller's."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _once(self, *key: object, make: Callable[[], _Value], spoilt: bool | None = None) -> _Value:
        """What `make` gives, made once; where the fault has not spoilt it, once for all faults."""
        spoilt = self.fault is not HEALTHY if spoilt is None else spoilt
        if not spoilt and self._healthy is not None:
            return self._healthy._once(*key, make=make)  # noqa: SLF001 - its own class
        if key not in self._made:
            self._made[key] = make()
        found: _Value = self._made[key]
        return found

    # Models

    def subject(self, name: str) -> Subject:
        """The model of this name: one of the user's, a golden one, or a toy.

        Raises:
            ConfigError: BR100, none of them.
        """
        if name in self.subjects:
            return self.subjects[name]
        if name.startswith(golden_cases.PREFIX):
            golden_cases.golden_model(name)
        else:
            toy_named(name)
        return Subject(name=name)

    def checkpoint(self, case: Case) -> Path:
        """The Hugging Face checkpoint directory of a case's model."""
        subject = self.subject(case.model)
        if subject.hf is not None:
            return subject.hf

        def write() -> Path:
            directory = self.workdir / f"{case.model}-{case.dtype}" / "hf"
            if case.model.startswith(golden_cases.PREFIX):
                model = golden_cases.golden_model(case.model)
                golden_cases.write_checkpoint(model, directory, dtype=case.dtype)
            else:
                write_checkpoint(toy_named(case.model), directory, dtype=case.dtype)
            return directory

        return self._once("checkpoint", case.model, case.dtype, make=write, spoilt=False)

    def config(self, case: Case) -> dict[str, Any]:
        """Its parsed `config.json`."""
        path = self.checkpoint(case)
        return self._once("config", path, make=lambda: load_hf_config(path), spoilt=False)

    def spec(self, case: Case) -> ModelSpec:
        """What the bridge takes the model for."""
        path = self.checkpoint(case)

        def read() -> ModelSpec:
            with self.fault.changed_code():
                found = read_spec(path, carry=self.subject(case.model).carry)
            return found if self.fault.spec is None else self.fault.spec(found)

        return self._once("spec", path, make=read)

    def layout(self, case: Case, name: str | None = None) -> ParallelLayout:
        """The case's layout, or another by name, for the case's model."""
        return resolve_layout(name or case.layout or BASE_LAYOUT, self.spec(case))

    # Conversions

    def converted(self, case: Case, *, layout: str = BASE_LAYOUT) -> Path:
        """The case's model as a `torch_dist` that the bridge has written.

        Args:
            case: Names the model.
            layout: Ranks that the files are cut for.
        """
        hf = self.checkpoint(case)
        fault = self.fault
        return self._once(
            "converted", hf, layout,
            make=lambda: self._import(case, hf, self.layout(case, layout)),
            spoilt=any(one is not None for one in (fault.spec, fault.code, fault.checkpoint)),
        )  # fmt: skip

    def _options(self, case: Case) -> ConversionOptions:
        return ConversionOptions(carry=self.subject(case.model).carry)

    def _import(self, case: Case, hf: Path, layout: ParallelLayout) -> Path:
        target = self.fresh(f"{hf.parent.name}-{layout.name}-megatron")
        with self.fault.changed_code():
            import_checkpoint(
                hf,
                target,
                tensor_model_parallel_size=layout.tensor_model_parallel_size,
                pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
                num_layers_per_stage=[
                    sum(len(stage.layers) for stage in layout.stages_of(pp_rank))
                    for pp_rank in range(layout.pipeline_model_parallel_size)
                ],
                options=self._options(case),
            )
        if self.fault.checkpoint is not None:
            self.fault.checkpoint(target)
        return target

    def exported(self, case: Case, megatron: Path, *, hf_model: Path | None = None) -> Path:
        """A Megatron checkpoint of the case's model as Hugging Face's, anew on every call."""
        target = self.fresh(f"{megatron.name}-hf")
        with self.fault.changed_code():
            export_checkpoint(megatron, target, hf_model=hf_model, options=self._options(case))
        if self.fault.exported is not None:
            self.fault.exported(target)
        return target

    def fresh(self, name: str) -> Path:
        """A path in the working directory that does not exist yet."""
        number = sum(1 for _ in self.workdir.iterdir())
        return self.workdir / f"{number:04d}-{name}"

    def stored_tensors(self, case: Case) -> dict[str, str]:
        """Every tensor of the case's checkpoint, in words that change with any of its bits."""
        path = self.checkpoint(case)
        return self._once(
            "stored", path, make=lambda: describe_tensors(read_safetensors(path)), spoilt=False
        )

    def coded_checkpoint(self, case: Case) -> Path:
        """A checkpoint of the case's shapes whose elements say where they come from."""
        hf = self.checkpoint(case)

        def write() -> Path:
            directory = self.fresh(f"{hf.parent.name}-coded")
            coded.write_checkpoint(coded.codes_of(hf), directory, config=self.config(case))
            return directory

        return self._once("coded", hf, make=write, spoilt=False)

    def coded_megatron(self, case: Case) -> Path:
        """The same as a `torch_dist` that the bridge has written."""
        hf = self.coded_checkpoint(case)
        layout = self.layout(case, BASE_LAYOUT)
        return self._once("coded megatron", hf, make=lambda: self._import(case, hf, layout))

    # Numbers

    def probe(self, case: Case, name: str | None = None) -> Probe:
        """The case's probe, or another by name, for the case's model."""
        config = self.config(case)
        wanted = name or case.probe or "long"
        if wanted != INPUT_PROBE:
            return probe_named(
                wanted,
                config["vocab_size"],
                max_position_embeddings=config["max_position_embeddings"],
            )
        path = self.subject(case.model).input
        if path is None:
            raise ConfigError(f"{case.model} has no input of its own", where=case.id)
        return self._once(
            "input", path, make=lambda: as_probe(read_input(path), self.spec(case)), spoilt=False
        )

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
            "reference", path, case.dtype, probe.name, make=compute,
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

    def hf_model(self, case: Case) -> Any:  # noqa: ANN401 - transformers is not typed
        """The live Hugging Face model in the case's dtype; whoever hooks into it takes it out.

        Raises:
            ReferenceUnavailableError: HN204, it cannot be had, and the user has brought logits
                from where it can.
        """
        path, subject = self.checkpoint(case), self.subject(case.model)

        def load() -> Any:  # noqa: ANN401 - as above
            try:
                found = load_hf_model(
                    path,
                    dtype=case.dtype,
                    trust_remote_code=subject.trust_remote_code,
                    carry=subject.carry,
                )
            except (BridgeError, ImportError, OSError, RuntimeError, ValueError) as error:
                if not subject.references:
                    raise
                raise ReferenceUnavailableError(
                    f"the reference model cannot be run here: {str(error).splitlines()[0]}",
                    where=str(path),
                    hint="what needs the model itself, and not its logits, is not checked",
                ) from error
            if self.fault.reference is not None:
                self.fault.reference(found)
            return found

        return self._once(
            "hf model", path, case.dtype, make=load, spoilt=self.fault.reference is not None
        )

    def oracle_config(self, case: Case) -> dict[str, Any]:
        """The configuration as the oracle is given it."""
        config = self.config(case)
        return config if self.fault.oracle is None else self.fault.oracle(config)

    def oracle_weight(self, case: Case) -> Weight:
        """The weights by name, as the oracle wants them."""
        path = self.checkpoint(case)
        found: Weight = oracle_weights(path)
        return found

    def oracle_logits(self, case: Case, probe: Probe | None = None) -> Array:
        """The truth on the case's probe, or another: (batch, seq, vocab_size), float64."""
        path = self.checkpoint(case)
        probe = probe or self.probe(case)

        def compute() -> Array:
            logger.info("oracle logits of %s, %s probe", case.model, probe.name)
            return forward(
                self.oracle_config(case),
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
            "generated", path, case.dtype,
            make=lambda: hf_greedy(self.hf_model(case), prompts_of(self.probe(case, "short"))),
            spoilt=self.fault.reference is not None,
        )  # fmt: skip

    def oracle_continuation(self, case: Case, generated: Generated) -> Array:
        """The truth on every step along chosen tokens: (batch, num_steps, vocab_size)."""
        path, steps = self.checkpoint(case), generated.tokens.shape[1]
        tokens = np.concatenate([generated.prompts, generated.tokens[:, :-1]], axis=1)

        def compute() -> Array:
            positions = np.arange(tokens.shape[1])
            config, weight = self.oracle_config(case), self.oracle_weight(case)
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
            "reference gradients", path, case.dtype, probe.name, make=compute,
            spoilt=self.fault.reference is not None,
        )  # fmt: skip

    def oracle_gradients(self, case: Case) -> LossAndGradients:
        """The true loss and gradients on the short probe, float64."""
        path, probe = self.checkpoint(case), self.probe(case, "short")

        def compute() -> LossAndGradients:
            logger.info("oracle gradients of %s, %s probe", case.model, probe.name)
            return loss_and_gradients(
                self.oracle_config(case),
                self.oracle_weight(case),
                probe.input_ids,
                probe.position_ids,
            )

        return self._once(
            "oracle gradients", path, probe.name, make=compute,
            spoilt=self.fault.oracle is not None,
        )  # fmt: skip

    # Ranks

    def request(self, case: Case, *, layout: str | None = None) -> ModelRequest:
        """The case's model for rank processes: the user's Megatron checkpoint, or the HF one."""
        megatron = self.subject(case.model).megatron
        kind: Literal["hf", "megatron"] = "hf" if megatron is None else "megatron"
        return ModelRequest(
            spec=self.spec(case),
            layout=self.layout(case, layout),
            params_dtype=case.dtype,
            kind=kind,
            path=megatron or self.checkpoint(case),
            device="cuda" if case.device == "cuda" else "cpu",
            variant=self.fault.name,
        )

    def witnesses(self, case: Case) -> Witnesses:
        """The reference's and the oracle's state after every block, on the case's probe."""
        return self._once(
            "witnesses", self.checkpoint(case), case.dtype, case.probe,
            make=lambda: block_states.witnesses(case, self),
            spoilt=self.fault.reference is not None or self.fault.oracle is not None,
        )  # fmt: skip

    def block_states(self, case: Case) -> Gathered:
        """Megatron's state after every block, on the case's probe."""
        return self._once(
            "block states", self.request(case), case.probe,
            make=lambda: block_states.megatron_states(case, self),
        )  # fmt: skip

    def localisation(self, case: Case) -> Localisation:
        """Where and why the case's model goes wrong, on its layout and probe."""
        return self._once(
            "localisation", self.request(case), case.probe,
            make=lambda: localize.localise(case, self),
        )  # fmt: skip

    def megatron_logits(self, case: Case, *, layout: str | None = None) -> Array:
        """Megatron-Core's logits on the case's probe, (batch, seq, vocab_size)."""
        request, probe = self.request(case, layout=layout), self.probe(case)

        def compute() -> Array:
            found: list[Array] = self.run(
                case, request.layout, live.logits, request, probe.input_ids, probe.position_ids
            )
            return found[0]

        return self._once("logits", request, probe.name, make=compute)

    def saved_by_megatron(self, case: Case, layout: str | None = None) -> Path:
        """The case's model, in its own dtype, as Megatron-Core saves it from a layout's ranks."""
        request = replace(
            self.request(case, layout=layout), params_dtype=self.spec(case).params_dtype
        )

        def save() -> Path:
            target = self.fresh(f"{case.model}-{request.layout.name}-saved-by-megatron")
            self.run(case, request.layout, live.save_by_megatron, request, target)
            return target

        return self._once("saved by megatron", request, make=save)

    def run(
        self, case: Case, layout: ParallelLayout, function: RankFunction, *args: object
    ) -> list[Any]:
        """Run a function on the ranks of a layout, under the fault; see `RankPool.run`."""
        return self.pool(case.device).run(layout, function, *args, hook=self.fault.hook)

    def pool(self, device: str) -> RankPool:
        """The rank processes for a kind of device."""
        if device not in self._pools:
            self._pools[device] = RankPool(
                device="cuda" if device == "cuda" else "cpu",
                timeout=self.timeout,
                log_dir=self.log_dir,
            )
        return self._pools[device]
