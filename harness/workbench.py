"""What the cases of a run share, made once: models, conversions, and the ranks they run on.

Everything here is lazy and cached by what it depends on, so a single selected case costs only its
own inputs, and a whole suite converts each model once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

from bridge.conversion import ConversionOptions
from bridge.convert import export_checkpoint, import_checkpoint, read_spec
from bridge.errors import ConfigError
from bridge.hf_config import load_hf_config
from bridge.spec import ModelSpec, ParallelLayout
from harness import coded, live
from harness.compare import read_safetensors
from harness.detached import DetachedReference
from harness.golden import cases as golden_cases
from harness.golden.tensors import describe_tensors
from harness.hooks import HEALTHY, Fault, Seam
from harness.launcher import DEFAULT_TIMEOUT, RankPool
from harness.layouts import resolve_layout
from harness.live import ModelRequest
from harness.logits_file import as_probe, read_input
from harness.probes import INPUT_PROBE, Probe, probe_named
from harness.ranks import RankFunction
from harness.suite import Case
from harness.thresholds import Thresholds, load_thresholds
from harness.torchrun.lead import rank_source
from harness.toys import toy_named, write_checkpoint

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
        seed: Of synthetic weights, where `hf` is a configuration alone; see `harness.streaming`.
        blocks: The blocks that are streamed; None for all of them.
        streamed: Whether it is walked through, or held whole on ranks beside a walk: another proof,
            which a resumed run must not take for this one.
    """

    name: str
    hf: Path | None = None
    megatron: Path | None = None
    trust_remote_code: bool = False
    carry: tuple[str, ...] = ()
    input: Path | None = None
    references: Mapping[str, DetachedReference] = field(default_factory=dict, compare=False)
    seed: int = 0
    blocks: tuple[int, ...] | None = None
    streamed: Literal["no", "walk", "resident"] = "no"


class Workbench:
    """Models, conversions and ranks of a run; `harness.bench.Bench` adds the numbers.

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
        healthy: Self | None = None,
    ) -> None:
        self.workdir = workdir
        self._healthy = healthy
        self._lasting: Path = workdir if healthy is None else healthy._lasting  # noqa: SLF001 - its own class
        self.localises: bool = healthy is None or healthy.localises
        """Whether failed parity is explained; thousands of deliberate failures need not be."""
        self.subjects = dict(subjects or {})
        self.fault = fault
        self.timeout = timeout
        self.log_dir = log_dir
        self.thresholds = thresholds or load_thresholds()
        self._made: dict[tuple[object, ...], Any] = {}
        self._pools: dict[str, RankPool] = {} if healthy is None else healthy._pools  # noqa: SLF001 - its own class

    def under(self, fault: Fault, workdir: Path | None = None) -> Self:
        """The same bench with a fault: it shares ranks, and all that the fault leaves alone.

        It lives no longer than this one, and is not to be closed. What the fault spoils is made
        in `workdir`, which may be removed afterwards; by default beside all else.
        """
        return type(self)(
            workdir or self.workdir, subjects=self.subjects, fault=fault, timeout=self.timeout,
            log_dir=self.log_dir, thresholds=self.thresholds, healthy=self,
        )  # fmt: skip

    def beside(self, workdir: Path, subjects: Mapping[str, Subject]) -> Self:
        """A bench for other models, with the same fault, on the same ranks.

        What it makes is forgotten with it. It lives no longer than this one, and is not to be
        closed.
        """
        found = type(self)(
            workdir, subjects=subjects, fault=self.fault, timeout=self.timeout,
            log_dir=self.log_dir, thresholds=self.thresholds,
        )  # fmt: skip
        found._pools = self._pools  # noqa: SLF001 - its own class
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

    def spoils(self, *seams: Seam) -> bool:
        """Whether the fault comes in at one of these."""
        return any(getattr(self.fault, seam) is not None for seam in seams)

    @property
    def spoils_ranks(self) -> bool:
        """Whether the fault changes what ranks hold or compute from a Hugging Face checkpoint."""
        return self.spoils("spec", "code", "rank")

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
            directory = self._lasting / f"{case.model}-{case.dtype}" / "hf"
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

    def can_answer(self, case: Case) -> bool:
        """Whether the case's check can be answered here."""
        del case
        return True

    def limits(self, case: Case) -> Thresholds:
        """The limits for the case's model."""
        return self.thresholds.for_hidden_size(self.config(case)["hidden_size"])

    def layout(self, case: Case, name: str | None = None) -> ParallelLayout:
        """The case's layout, or another by name, for the case's model."""
        return resolve_layout(name or case.layout or BASE_LAYOUT, self.spec(case))

    def stored_sizes(self, case: Case) -> list[int]:
        """Elements of each tensor that the case's checkpoint holds."""
        return list(coded.codes_of(self.checkpoint(case)).sizes())

    # Conversions

    def converted(self, case: Case, *, layout: str = BASE_LAYOUT) -> Path:
        """The case's model as a `torch_dist` that the bridge has written.

        Args:
            case: Names the model.
            layout: Ranks that the files are cut for.
        """
        hf = self.checkpoint(case)
        return self._once(
            "converted", hf, layout,
            make=lambda: self._import(case, hf, self.layout(case, layout)),
            spoilt=self.spoils("spec", "code", "checkpoint"),
        )  # fmt: skip

    def _options(self, case: Case) -> ConversionOptions:
        return ConversionOptions(carry=self.subject(case.model).carry)

    def _import(self, case: Case, hf: Path, layout: ParallelLayout) -> Path:
        spoilt = self.spoils("spec", "code", "checkpoint")
        target = self.fresh(f"{case.model}-{layout.name}-megatron", spoilt=spoilt)
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
        target = self.fresh(f"{case.model}-hf")
        with self.fault.changed_code():
            export_checkpoint(megatron, target, hf_model=hf_model, options=self._options(case))
        if self.fault.exported is not None:
            self.fault.exported(target)
        return target

    def fresh(self, name: str, *, spoilt: bool = True) -> Path:
        """A path that does not exist yet; what no fault has spoilt outlasts the fault's bench."""
        root = self.workdir if spoilt else self._lasting
        number = sum(1 for _ in root.iterdir())
        return root / f"{number:04d}-{name}"

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
            directory = self.fresh(f"{case.model}-coded", spoilt=False)
            coded.write_checkpoint(coded.codes_of(hf), directory, config=self.config(case))
            return directory

        return self._once("coded", hf, make=write, spoilt=False)

    def coded_megatron(self, case: Case) -> Path:
        """The same as a `torch_dist` that the bridge has written."""
        hf = self.coded_checkpoint(case)
        layout = self.layout(case, BASE_LAYOUT)
        return self._once(
            "coded megatron", hf, make=lambda: self._import(case, hf, layout),
            spoilt=self.spoils("spec", "code", "checkpoint"),
        )  # fmt: skip

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

    # Ranks

    def request(self, case: Case, *, layout: str | None = None) -> ModelRequest:
        """The case's model for rank processes: the user's Megatron checkpoint, or the HF one."""
        subject, hf = self.subject(case.model), self.checkpoint(case)
        kind: Literal["hf", "megatron", "synthetic"] = "hf" if hf.is_dir() else "synthetic"
        if subject.megatron is not None:
            kind = "megatron"
        return ModelRequest(
            spec=self.spec(case),
            layout=self.layout(case, layout),
            params_dtype=case.dtype,
            kind=kind,
            path=subject.megatron or hf,
            seed=subject.seed,
            carry=subject.carry,
            device="cuda" if case.device == "cuda" else "cpu",
            layers=case.layers,
            variant=self.fault.name if self.spoils_ranks else HEALTHY.name,
        )

    def saved_by_megatron(self, case: Case, layout: str | None = None) -> Path:
        """The case's model, in its own dtype, as Megatron-Core saves it from a layout's ranks."""
        request = replace(
            self.request(case, layout=layout), params_dtype=self.spec(case).params_dtype
        )

        def save() -> Path:
            name = f"{case.model}-{request.layout.name}-saved-by-megatron"
            target = self.fresh(name, spoilt=self.spoils_ranks)
            self.run(case, request.layout, live.save_by_megatron, request, target)
            return target

        return self._once("saved by megatron", request, make=save, spoilt=self.spoils_ranks)

    def run(
        self, case: Case, layout: ParallelLayout, function: RankFunction, *args: object
    ) -> list[Any]:
        """Run a function on the ranks of a layout, under the fault; see `RankPool.run`."""
        return self.pool(case.device, case.layers).run(
            layout, function, *args, hook=self.fault.hook
        )

    def prepare(self, cases: Sequence[Case]) -> None:
        """Do at once what cases share, where that is cheaper; nothing by default."""

    def warm_up(self, device: str) -> None:
        """Import Megatron-Core while something else runs."""
        self.pool(device).warm_up()

    def pool(self, device: str, layers: str = "local") -> RankPool:
        """The rank processes for a kind of device, and there for one kind of layers.

        A process of Transformer Engine's has one attention backend. Of a GPU's ranks only those of
        one kind live at a time: the others' models would fill it.
        """
        key = device if device == "cpu" else f"{device}/{layers}"
        if key not in self._pools:
            source = rank_source()
            lasting = () if source.capacity is not None else ("cpu",)
            for other in [one for one in self._pools if one not in lasting]:
                self._pools.pop(other).close()
            self._pools[key] = RankPool(
                device="cuda" if device == "cuda" else "cpu",
                timeout=self.timeout,
                log_dir=self.log_dir,
                source=source,
            )
        return self._pools[key]
