"""Megatron continues prompts as transformers does, through its cache, over every layout.

The reference is transformers' own `generate` on the same checkpoint, one prompt at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bridge.convert import read_spec
from bridge.errors import InconsistentConfigError, LayoutError, UsageError
from bridge.generation.decoder import Decoder
from bridge.generation.decoding import Continuation, Step, check_prompts, generate
from bridge.generation.sampling import GREEDY, Sampling
from bridge.pipeline import parse_layout, plan_layout
from harness.launcher import RankPool
from harness.live import ModelRequest
from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests.bridge.generation import generation_ranks as ranks
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    import generation_ranks as ranks

pytestmark = pytest.mark.ranks

PROMPTS = [[7, 3, 99, 12, 250, 31], [401], [5, 5, 8, 1, 0, 2, 2, 300, 17, 44], [12, 13]]
NUM_TOKENS = 9

Request = Callable[[str, str], ModelRequest]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Ranks of every layout here."""
    with RankPool(timeout=120) as found:
        found.warm_up()
        yield found


@pytest.fixture(scope="module")
def request_of(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """The request for a toy under a layout, in float32."""
    home = tmp_path_factory.mktemp("toys")

    def request(name: str, layout: str) -> ModelRequest:
        path = home / name
        if not path.exists():
            write_checkpoint(toy_named(name), path, dtype="float32")
        spec = read_spec(path)
        return ModelRequest(
            spec=spec,
            layout=parse_layout(layout, spec),
            params_dtype="float32",
            kind="hf",
            path=path,
        )

    return request


def by_transformers(
    path: Path, prompts: Sequence[Sequence[int]], eos_token_id: list[int] | None = None
) -> list[tuple[int, ...]]:
    """New tokens of each prompt alone, greedily, the ending one included."""
    import torch
    from transformers import AutoModelForCausalLM

    import bridge.decilm  # noqa: F401 - registers it

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = eos_token_id
    model.generation_config.pad_token_id = 0
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False
        )
        found.append(tuple(made[0, len(prompt) :].tolist()))
    return found


def new_tokens(found: Sequence[Continuation]) -> list[tuple[int, ...]]:
    """Of each prompt."""
    return [one.token_ids for one in found]


def generated(
    pool: RankPool,
    request: ModelRequest,
    prompts: list[list[int]],
    *,
    sampling: Sampling = GREEDY,
    stop_token_ids: Sequence[int] = (),
    batch_size: int = 8,
) -> tuple[list[Continuation], list[Step]]:
    """What all ranks agree on."""
    told = pool.run(
        request.layout, ranks.continuations, request, prompts, NUM_TOKENS, sampling,
        list(stop_token_ids), batch_size,
    )  # fmt: skip
    for other in told[1:]:
        assert other == told[0]
    found: tuple[list[Continuation], list[Step]] = told[0]
    return found


@pytest.mark.parametrize(
    ("toy", "layouts"),
    [
        # 2 query groups: TP=4 shares each of them among two ranks.
        ("nano-4b", ["tp1-pp1", "tp2-pp1", "tp4-pp1", "tp1-pp2"]),
        ("51b", ["tp1-pp1", "tp2-pp2", "tp1-pp2-vp2"]),  # linear and no-op blocks, 3 group counts
        ("ultra-253b", ["tp1-pp1"]),
        ("tied", ["tp1-pp2"]),
    ],
)
def test_greedy_text_is_that_of_transformers(
    pool: RankPool, request_of: Request, toy: str, layouts: list[str]
) -> None:
    """Token by token, prompts of four lengths in one batch, on every rank of every layout."""
    expected = by_transformers(request_of(toy, "tp1-pp1").path, PROMPTS)
    assert len(set(expected)) == len(PROMPTS)
    for layout in layouts:
        found, _ = generated(pool, request_of(toy, layout), PROMPTS)
        assert new_tokens(found) == expected, layout
        assert [one.finish_reason for one in found] == ["length"] * len(PROMPTS)


@pytest.mark.parametrize(
    ("toy", "layout"), [("nano-4b", "tp1-pp1"), ("nano-4b", "tp4-pp1"), ("51b", "tp2-pp2")]
)
def test_the_cache_changes_no_logits(
    pool: RankPool, request_of: Request, toy: str, layout: str
) -> None:
    """At each step they are those of a forward pass over all tokens, but for the order of sums."""
    request = request_of(toy, layout)
    tokens = [[3 + 7 * row + 11 * column for column in range(12)] for row in range(3)]
    for steps in pool.run(request.layout, ranks.cached_and_whole, request, tokens, 4):
        assert len(steps) == 9
        for error, size in steps:
            assert error < 5e-6 * size  # 40 ulp of float32; a wrong position is 0.1 and more


def test_a_batch_gives_each_prompt_what_it_gives_alone(pool: RankPool, request_of: Request) -> None:
    """Sampled too: its random numbers are its own."""
    request = request_of("51b", "tp1-pp1")
    sampling = Sampling(temperature=1.3, seed=5)
    together, in_pairs, alone = (
        generated(pool, request, PROMPTS, sampling=sampling, batch_size=size)[0]
        for size in (8, 2, 1)
    )
    assert together == in_pairs == alone


def test_sampling_repeats_by_its_seed_over_layouts(pool: RankPool, request_of: Request) -> None:
    """Another seed gives another text; another layout does not."""

    def text(layout: str, seed: int) -> list[tuple[int, ...]]:
        sampling = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=seed)
        request = request_of("nano-4b", layout)
        return new_tokens(generated(pool, request, PROMPTS, sampling=sampling)[0])

    texts = [text("tp1-pp1", 1), text("tp2-pp1", 1), text("tp1-pp2", 1), text("tp1-pp1", 2)]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    greedy, _ = generated(pool, request_of("nano-4b", "tp1-pp1"), PROMPTS)
    assert texts[0] != new_tokens(greedy)


def test_any_of_the_ending_tokens_ends_a_text(pool: RankPool, request_of: Request) -> None:
    """It is the last one; others of the batch go on, as transformers has it."""
    request = request_of("nano-4b", "tp2-pp1")
    whole = by_transformers(request.path, PROMPTS)
    ends = [whole[0][2], whole[2][4]]
    expected = by_transformers(request.path, PROMPTS, eos_token_id=ends)
    found, steps = generated(pool, request, PROMPTS, stop_token_ids=ends)
    assert new_tokens(found) == expected
    assert [one.finish_reason for one in found] == [
        "stop" if text[-1] in ends else "length" for text in expected
    ]
    assert {"stop", "length"} == {one.finish_reason for one in found}
    # What was told on the way is the same.
    assert [
        tuple(token for step in steps for at, token in step.tokens if at == index)
        for index in range(len(PROMPTS))
    ] == expected
    finished = dict(one for step in steps for one in step.finished)
    assert [finished[index] for index in range(len(PROMPTS))] == [
        one.finish_reason for one in found
    ]


def test_a_decoder_takes_no_tokens_that_it_has_no_place_for(
    pool: RankPool, request_of: Request
) -> None:
    """Another batch, more than there is room, several behind the first: attention is causal."""
    request = request_of("nano-4b", "tp1-pp1")
    (said,) = pool.run(request.layout, ranks.refusals, request)
    assert [bool(one) for one in said] == [True, True, False, True, False, True]
    assert said[3] == "2 x 2 tokens for a cache of 2 x 4 that holds 3 of each sequence"


@pytest.mark.parametrize("pp", [1, 2])
def test_a_model_in_training_speaks_as_it_came_from_auto_bridge(
    pool: RankPool, tmp_path: Path, pp: int
) -> None:
    """Inside the wrapper of bfloat16, its modes as they were, after an error too."""
    write_checkpoint(toy_named("51b"), tmp_path / "hf", dtype="bfloat16")
    layout = plan_layout(read_spec(tmp_path / "hf"), pipeline_model_parallel_size=pp)
    for wrapped, bare, modes in pool.run(
        layout, ranks.in_training, tmp_path / "hf", pp, PROMPTS, NUM_TOKENS
    ):
        assert wrapped == bare
        assert modes[0].count(True) > 10
        assert modes[0].count(False) > 1
        assert modes[0] == modes[1] == modes[2]


def test_a_layout_that_is_not_the_model_s_is_refused(pool: RankPool, request_of: Request) -> None:
    """One rank of two alone would give another text."""
    request = request_of("nano-4b", "tp1-pp1")
    (said,) = pool.run(request.layout, ranks.under_another_layout, request, "tp2-pp1")
    assert said.startswith("BR200 the model is cut as tp1-pp1, not as the layout tp2-pp1 says")
    assert "--> tensor_model_parallel_size: 1, the layout has 2" in said


def test_what_is_no_list_of_token_ids_is_refused(request_of: Request) -> None:
    """A tensor, floats, truths, a flat list and a text."""
    import torch

    spec = request_of("nano-4b", "tp1-pp1").spec
    numpys: Any = [[np.int64(3)], (4, 5)]
    check_prompts(numpys, spec, max_new_tokens=1)
    whole: Any = torch.tensor([[1, 2]])
    with pytest.raises(UsageError, match="lists of token ids, and this is a Tensor") as caught:
        check_prompts(whole, spec, max_new_tokens=1)
    assert caught.value.hint == "token ids are ints; `tolist()` makes lists of a tensor's"
    odd: Any = [[1], [1.0], whole[0], [True], 3, "w3", [whole[0, 0]]]
    with pytest.raises(UsageError) as caught:
        check_prompts(odd, spec, max_new_tokens=1)
    assert caught.value.where == tuple(
        f"prompt {number} is no list of token ids" for number in range(2, 8)
    )


def test_sequence_parallelism_and_too_many_positions_are_refused(
    pool: RankPool, request_of: Request
) -> None:
    """There is no sequence in one token; and no rotation was trained beyond the last position."""
    with pytest.raises(LayoutError, match="sequence parallelism of tp2-pp1-sp"):
        generated(pool, request_of("nano-4b", "tp2-pp1-sp"), PROMPTS)
    request = request_of("nano-4b", "tp1-pp1")
    too_long = [0] * request.spec.max_position_embeddings
    with pytest.raises(UsageError, match="1 of 1 prompts cannot be continued"):
        generate([], request.spec, request.layout, [too_long], max_new_tokens=1)

    with pytest.raises(InconsistentConfigError, match="positions"):
        Decoder([], request.spec, request.layout, batch_size=1, max_sequence_length=1 << 20)


def test_all_that_is_wrong_with_prompts_is_said_at_once(request_of: Request) -> None:
    """Every prompt by its number; the longest that fits does."""
    spec = request_of("nano-4b", "tp1-pp1").spec
    limit = spec.max_position_embeddings
    check_prompts([[0] * (limit - 3)], spec, max_new_tokens=3)
    with pytest.raises(UsageError) as caught:
        check_prompts([[1], [], [spec.vocab_size], [-1], [0] * (limit - 2)], spec, max_new_tokens=3)
    assert caught.value.where == (
        "prompt 2 is empty",
        f"prompt 3 has tokens outside [0, {spec.vocab_size})",
        f"prompt 4 has tokens outside [0, {spec.vocab_size})",
        (
            f"prompt 5: {limit - 2} tokens and 3 new ones are more than "
            f"max_position_embeddings={limit}"
        ),
    )
    assert caught.value.hint == "shorten the prompt or ask for fewer new tokens"
    with pytest.raises(UsageError, match="0 new tokens are none"):
        check_prompts([[1]], spec, max_new_tokens=0)
