"""The strip of blocks in a terminal: right, within 80 columns, the same without colours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bridge.convert import read_spec
from bridge.drawing.architecture import Architecture, DrawnBlock, DrawnStage, SubBlock, architecture
from bridge.drawing.strip import strip
from bridge.pipeline import plan_layout

VARIANTS = sorted((Path(__file__).parents[3] / "suites" / "variants").glob("*.json"))

NO_OP, LINEAR = SubBlock("no_op"), SubBlock("linear")


def drawn(*blocks: tuple[SubBlock, SubBlock], **fields: object) -> Architecture:
    """A model of these blocks."""
    found = Architecture(
        name="m", facts="", num_parameters=1, embedding_parameters=1, output_parameters=1,
        blocks=tuple(
            DrawnBlock(attention=attention, ffn=ffn, num_parameters=1) for attention, ffn in blocks
        ),
    )  # fmt: skip
    return dataclasses.replace(found, **fields)  # type: ignore[arg-type]


def stage(pp_rank: int, first: int, count: int) -> DrawnStage:
    """A pipeline stage."""
    return DrawnStage(
        pp_rank=pp_rank, vp_stage=0, first_layer=first, num_layers=count, num_parameters=1
    )


MIXED = drawn(
    (SubBlock("full", 8), SubBlock("full", 64)),
    (SubBlock("full", 16), SubBlock("full", 4)),
    (NO_OP, SubBlock("full", 256)),
    (LINEAR, NO_OP),
    (NO_OP, LINEAR),
    stages=(stage(0, 0, 2), stage(1, 2, 3)),
)


def test_each_block_is_one_column() -> None:
    """Groups as a digit or a letter, widths by letter in ascending order, bars by square root."""
    assert strip(MIXED, ascii_only=False).plain.splitlines() == [
        "layer     0",
        "attention 8B.-.",
        "          ▅▂█.-",
        "ffn       bac.-",
        "pp rank   00111",
        "",
        "attention 8=8 groups (1)  B=16 groups (1)  -=one matrix (1)  .=none (2)",
        "ffn       a=4 (1)  b=64 (1)  c=256 (1)  -=one matrix (1)  .=none (1)",
        "          (number of blocks); an ffn is named by its hidden width",
    ]


def test_ascii_says_as_much() -> None:
    """No bars, and nothing else is lost."""
    plain = strip(MIXED, ascii_only=True).plain
    assert plain.isascii()
    whole = strip(MIXED, ascii_only=False).plain.splitlines()
    assert plain.splitlines() == [line for line in whole if line.isascii()]


def test_long_models_go_on_in_rows_of_equal_length() -> None:
    """65 blocks: two rows of 40 and 25, ticks at every tenth; one stage needs no ranks."""
    block = (SubBlock("full", 1), SubBlock("full", 9))
    lines = strip(drawn(*[block] * 65), ascii_only=True).plain.splitlines()
    assert lines[0] == "layer     0         10        20        30"
    assert lines[1] == "attention " + 40 * "1"
    assert lines[4] == "layer     40        50        60"
    assert lines[5] == "attention " + 25 * "1"
    assert not any(line.startswith("pp rank") for line in lines)


def test_many_ranks_and_widths_have_characters() -> None:
    """62 ranks and 52 widths have one of their own; the legend says how either goes on."""
    blocks = [(NO_OP, SubBlock("full", width)) for width in range(1, 71)]
    found = drawn(*blocks, stages=tuple(stage(rank, rank, 1) for rank in range(70)))
    lines = strip(found, ascii_only=True).plain.splitlines()
    ranks = [line.split()[-1] for line in lines if line.startswith("pp rank")]
    assert "".join(ranks)[:12] == "0123456789ab"
    assert "".join(ranks)[61:64] == "Z01"
    assert {"Z=52", "a=53"} <= set("\n".join(lines).split())
    assert lines[-3:] == [
        "          (number of blocks); an ffn is named by its hidden width;",
        "          pp ranks go on with a-z, A-Z, and then from 0 again;",
        "          there are more sizes than letters: some letters stand for several",
    ]


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_every_variant_fits_80_columns_and_shows_each_block(path: Path) -> None:
    """One character a block in every row, and counts that add up."""
    spec = read_spec(path)
    layout = plan_layout(spec, pipeline_model_parallel_size=8)
    for ascii_only in (False, True):
        text = strip(architecture(spec, layout, name=path.stem), ascii_only=ascii_only).plain
        lines = text.splitlines()
        assert max(map(len, lines)) <= 80
        assert not any(line != line.rstrip() for line in lines)
        for row in ("attention ", "ffn       ", "pp rank   "):
            columns = [line[10:] for line in lines if line.startswith(row) and "=" not in line]
            assert sum(map(len, columns)) == spec.num_layers


def test_more_sizes_than_letters_are_drawn_and_said() -> None:
    """Whatever a model is made of: the legend says that letters come again."""
    many = [(SubBlock("full", 8 + count), SubBlock("full", 8 * count)) for count in range(1, 61)]
    lines = strip(drawn(*many), ascii_only=True).plain.splitlines()
    assert "some letters stand for several" in lines[-1]
    assert max(map(len, lines)) <= 80
    assert "several" not in strip(drawn(*many[:52]), ascii_only=True).plain
