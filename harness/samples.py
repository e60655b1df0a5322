"""A drawn model in a drawn layout, whole enough to be written down and checked for real.

A sample is what one live case needs: a `config.json`, a seed for its weights and the name of a
layout. `covering_samples` picks few of them that together have every feature asked for, so that a
short run over real models is no lottery.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from bridge.spec import ModelSpec, ParallelLayout
from harness.errors import SuiteError
from harness.features import (
    CONFIG_FEATURES,
    LAYOUT_FEATURES,
    SPEC_FEATURES,
    features_of_config,
    features_of_layout,
    features_of_spec,
)
from harness.layouts import resolve_layout, runs
from harness.strategies import DrawnConfig, hf_configs, parallel_layouts

MAX_WORLD_SIZE: Final = 4
"""Ranks of one sample at most: they share this host with everything else."""
LIVE_FEATURES: Final = (SPEC_FEATURES | CONFIG_FEATURES | LAYOUT_FEATURES) - {"tp8"}
"""What samples can have: all that fits on `MAX_WORLD_SIZE` ranks."""
_DIVISOR: Final = 128
"""What vocabularies are padded to times TP, where a layout is given by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A model as its `config.json` states it, and a layout.

    Args:
        config: The parsed `config.json`.
        spec: What it states.
        schema: Block schema it is stated in; None for a Llama.
        rope_style: How it states RoPE.
        layout: As `harness.layouts.resolve_layout` takes it, stages spelled out.
        seed: Of the weights.
    """

    config: Mapping[str, Any]
    spec: ModelSpec
    schema: str | None
    rope_style: str
    layout: str
    seed: int = 0

    @property
    def parallel_layout(self) -> ParallelLayout:
        """The layout of this name for this model."""
        return resolve_layout(self.layout, self.spec)

    @property
    def features(self) -> frozenset[str]:
        """Which of `LIVE_FEATURES` it has."""
        drawn = DrawnConfig(
            config=dict(self.config),
            spec=self.spec,
            schema=self.schema,
            rope_style=self.rope_style,
        )
        return (
            features_of_spec(self.spec)
            | features_of_config(drawn)
            | features_of_layout(self.spec, self.parallel_layout)
        )

    def describe(self) -> str:
        """One line for a log: sizes, blocks, layout."""
        spec = self.spec
        return (
            f"{self.schema or 'llama'}, {spec.num_layers} layers, hidden {spec.hidden_size}, "
            f"{spec.num_attention_heads} heads of {spec.kv_channels}, vocab {spec.vocab_size}, "
            f"{self.layout}, seed {self.seed}"
        )


def spell(layout: ParallelLayout) -> str:
    """The name that `resolve_layout` turns into this layout, the layers of each stage included."""
    if layout.pipeline_model_parallel_size == 1:
        return layout.name
    return f"{layout.name}-l{'.'.join(map(str, layout.num_layers_per_stage))}"


@st.composite
def samples(draw: DrawFn, *, max_layers: int = 5, max_world_size: int = MAX_WORLD_SIZE) -> Sample:
    """Any model of the family, as any schema states it, in any layout that runs on few ranks."""
    drawn = draw(hf_configs(max_layers=max_layers))
    layout = draw(layout_names(drawn.spec, max_world_size=max_world_size))
    resolved, config, spec = resolve_layout(layout, drawn.spec), drawn.config, drawn.spec
    changes: dict[str, Any] = {}
    if draw(st.integers(0, 5)) == 0:  # else a vocabulary without padding is a rarity
        changes["vocab_size"] = _DIVISOR * resolved.tensor_model_parallel_size
    if spec.params_dtype == "float16":  # weights are drawn as float32 or bfloat16
        changes["params_dtype"] = "bfloat16"
    if drawn.schema is None and spec.hidden_size % spec.num_attention_heads:
        # transformers 5.23 refuses such a Llama, even with its head_dim given.
        heads = spec.num_attention_heads
        changes["hidden_size"] = -(-spec.hidden_size // heads) * heads
    spec = replace(spec, **changes)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = spec.params_dtype
    return Sample(
        config=config | {"vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size},
        spec=spec,
        schema=drawn.schema,
        rope_style=drawn.rope_style,
        layout=layout,
        seed=draw(st.integers(0, 999)),
    )


def layout_names(spec: ModelSpec, *, max_world_size: int = MAX_WORLD_SIZE) -> SearchStrategy[str]:
    """Names of layouts that this model runs in; sequence parallelism goes where it cannot."""
    names = parallel_layouts(spec, max_world_size=max_world_size, max_pipeline_stages=5).map(spell)
    return names.map(lambda name: name if runs(spec, name) else name.replace("-sp", ""))


def covering_samples(
    features: Collection[str] = LIVE_FEATURES,
    *,
    max_draws: int = 3000,
    start: int = 0,
) -> list[Sample]:
    """Few samples that have every one of these features between them, the same on every call.

    Samples are drawn until nothing is missing; then the one with most features still uncovered is
    taken, again and again.

    Args:
        features: What must be met; some of `LIVE_FEATURES`.
        max_draws: When to give up.
        start: Another number gives other samples.

    Raises:
        SuiteError: HN101, a feature was never drawn: a test that goes on without it would be
            weaker than its name.
    """
    wanted = frozenset(features)
    drawn: list[tuple[Sample, frozenset[str]]] = []
    missing = set(wanted)
    for batch in range(start, start + max(1, max_draws // 100)):
        drawn += [(sample, sample.features & wanted) for sample in draw_samples(100, start=batch)]
        missing = set(wanted).difference(*(found for _, found in drawn))
        if not missing:
            return _fewest(drawn, wanted)
    raise SuiteError(
        f"{len(drawn)} samples have none of: {', '.join(sorted(missing))}",
        hint="ask for features that a sample can have, or for more draws",
    )


def _fewest(drawn: Sequence[tuple[Sample, frozenset[str]]], wanted: frozenset[str]) -> list[Sample]:
    chosen: list[Sample] = []
    left = set(wanted)
    while left:
        sample, found = max(drawn, key=lambda one: (len(one[1] & left), -_size(one[0])))
        chosen.append(sample)
        left -= found
    return chosen


def _size(sample: Sample) -> int:
    """Of two samples with the same features, the cheaper one is taken."""
    return sample.spec.num_layers * sample.spec.hidden_size * sample.parallel_layout.world_size


def draw_samples(count: int, *, start: int = 0) -> list[Sample]:
    """A number of samples, the same for the same `start`."""
    found: list[Sample] = []

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(samples())
    def draw(sample: Sample) -> None:
        found.append(sample)

    draw()
    return found
