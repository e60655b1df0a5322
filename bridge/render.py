"""The text that `inspect`, `import` and `export` print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bridge.console import gib, print_json, stdout, table
from bridge.render_layouts import print_memory

if TYPE_CHECKING:
    from bridge.drawing.architecture import Architecture


def print_description(
    model: str, found: dict[str, Any], picture: Architecture, *, all_blocks: bool
) -> None:
    """A model's dimensions, its blocks, and what each rank of the layout holds."""
    from bridge.drawing.strip import strip

    console = stdout()
    rope = ", ".join(f"{name} {value:g}" for name, value in found["rope"].items())
    tied = "tied" if found["share_embeddings_and_output_weights"] else "untied"
    console.print(f"{model}: {found['architecture']}, {found['num_layers']} layers")
    console.print(
        f"{found['num_parameters']:,} parameters in {found['num_tensors']} tensors, "
        f"{gib(found['nbytes'])} in {found['params_dtype']}"
    )
    console.print(
        f"hidden_size {found['hidden_size']}, num_attention_heads {found['num_attention_heads']}, "
        f"kv_channels {found['kv_channels']}, vocab_size {found['vocab_size']} ({tied}), "
        f"max_position_embeddings {found['max_position_embeddings']}, "
        f"layernorm_epsilon {found['layernorm_epsilon']:g}"
    )
    console.print(f"RoPE: {rope}")
    for name, reasons in found["consumers_that_refuse"].items():
        console.print(f"{name} cannot take this model: {'; '.join(reasons)}")
    console.print()
    console.print(strip(picture, ascii_only=console.options.ascii_only))
    if all_blocks:
        rows = table("layers", "attention", "ffn", "parameters/block", right=("parameters/block",))
        for run in found["blocks"]:
            rows.add_row(
                run["layers"], run["attention"], run["ffn"], f"{run['parameters_per_block']:,}"
            )
    else:
        right = ("blocks", "first", "parameters/block")
        rows = table("blocks", "first", "attention", "ffn", "parameters/block", right=right)
        for kind in found["block_kinds"]:
            rows.add_row(
                str(kind["num_blocks"]), str(kind["first_layer"]), kind["attention"], kind["ffn"],
                f"{kind['parameters_per_block']:,}",
            )  # fmt: skip
    console.print(rows)
    console.print(f"\nlayout {found['layout']}, padded_vocab_size {found['padded_vocab_size']}")
    sizes = ("parameters", "per TP rank", "weights/rank")
    places = ("pp rank", "vp stage", "layers")
    stages = table(*places, "also", *sizes, right=(*places, *sizes))
    for stage in found["stages"]:
        first, count = stage["first_layer"], stage["num_layers"]
        ends = [name for name in ("embedding", "output_layer") if stage[name]]
        stages.add_row(
            str(stage["pp_rank"]), str(stage["vp_stage"]),
            f"{first}-{first + count - 1}" if count else "none", ", ".join(ends),
            f"{stage['parameters']:,}", f"{stage['parameters_per_rank']:,}",
            gib(stage["nbytes_per_rank"]),
        )  # fmt: skip
    console.print(stages)
    print_memory(found["memory"])


def print_report(report: dict[str, Any], *, json_: bool) -> None:
    """What a conversion did, for people or as JSON."""
    if json_:
        print_json(report)
        return
    console = stdout()
    seconds = report["convert_seconds"]
    rate = f" ({report['nbytes'] / seconds / 1e9:.2f} GB/s)" if seconds else ""
    verified = (
        f"verified bit by bit in {report['verify_seconds']:.1f} s"
        if report["verified"]
        else "not verified (--verify none)"
    )
    workers = report["workers"]
    several = f" summed over {workers} workers" if workers > 1 else ""
    console.print(
        f"{report['source']} -> {report['target']}\n"
        f"{report['num_parameters']:,} parameters, {report['num_source_tensors']} -> "
        f"{report['num_target_tensors']} tensors, {report['nbytes'] / 1e9:.3f} GB in "
        f"{seconds:.1f} s{rate}, {verified}, "
        f"peak memory {gib(report['peak_rss'])}{several}"
    )
    for note in report["notes"]:
        console.print(f"note: {note}")
