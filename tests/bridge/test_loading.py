"""Live tensors are filled in place, every element once, from exactly the tensors named."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

import bridge.loading
from bridge.dtypes import Words, dtype_named
from bridge.errors import AccountingError, CorruptFileError, DtypeMismatchError
from bridge.loading import fill
from bridge.parameters import hf_tensors, parameters
from bridge.spec import BlockSpec, GroupedQueryAttention, ModelSpec, RopeSpec, SwiGLU
from bridge.storage.source import TensorInfo
from bridge.tiling import Box, Tile, Tiling
from bridge.transfer import TransferLimits

SHAPE = (6, 4)
TILING = Tiling(
    (5, 4),
    (
        Tile("a", Box((4, 0), (6, 4)), Box((0, 0), (2, 4))),
        Tile("a", Box((0, 1), (2, 3)), Box((2, 2), (4, 4))),
        Tile("a", Box((2, 0), (4, 2)), Box((2, 0), (4, 2))),
        Tile(None, Box((0, 0), (1, 4)), Box((4, 0), (5, 4))),
    ),
)


class _Source:
    """Tensors of these words, or one tensor "a"; `on_read` is called within every read."""

    def __init__(
        self,
        tensors: dict[str, torch.Tensor] | torch.Tensor,
        dtype: str,
        on_read: Callable[[], object] = lambda: None,
    ) -> None:
        found = {"a": tensors} if isinstance(tensors, torch.Tensor) else tensors
        self.words: dict[str, Words] = {
            name: one.view(getattr(torch, f"int{8 * one.element_size()}"))
            .numpy()
            .view(f"<u{one.element_size()}")
            for name, one in found.items()
        }
        self.tensors = {
            name: TensorInfo(shape=tuple(one.shape), dtype=dtype_named(dtype))
            for name, one in found.items()
        }
        self.reads: list[tuple[str, Box]] = []
        self.on_read = on_read

    def read_into(self, name: str, box: Box, out: Words) -> None:
        assert out.dtype == self.tensors[name].dtype.word
        self.reads.append((name, box))
        self.on_read()
        out[...] = self.words[name][box.slices]

    def close(self) -> None:
        """Nothing is open."""


def expected(a: torch.Tensor) -> torch.Tensor:
    """The tiling above, by hand."""
    whole = torch.zeros(5, 4, dtype=a.dtype)
    whole[0:2] = a[4:6]
    whole[2:4, 2:4] = a[0:2, 1:3]
    whole[2:4, 0:2] = a[2:4, 0:2]
    return whole


def rows(name: str, count: int, columns: int = 4) -> Tiling:
    """A tensor that is another, whole."""
    whole = Box.whole((count, columns))
    return Tiling(whole.shape, (Tile(name, whole, whole),))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_bits_are_moved_and_not_computed_with(dtype: str) -> None:
    """NaN payloads, negative zeros and subnormals arrive as they were."""
    bits = np.arange(24, dtype=np.int64).reshape(SHAPE) * 2731 + 1
    width = dtype_named(dtype).itemsize
    words = torch.from_numpy(bits.astype(f"<i{width}") - 2**14)
    source = _Source(words.view(getattr(torch, dtype)), dtype)
    target = torch.full((5, 4), torch.nan, dtype=getattr(torch, dtype))
    fill([("t", target, TILING)], source, {"a": SHAPE})
    assert torch.equal(expected(words), target.view(words.dtype))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("piece", [4, 12, 16, 36, 4000])
def test_another_dtype_is_rounded_once_in_pieces(
    piece: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of the buffers, the result is torch's own cast of the whole."""
    monkeypatch.setattr(bridge.loading, "_PIECE", piece)
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    source = _Source(values, "float32")
    target = torch.full((5, 4), torch.nan, dtype=torch.bfloat16)
    limits = TransferLimits(threads=threads)
    fill([("t", target, TILING)], source, {"a": SHAPE}, limits=limits)
    assert torch.equal(expected(values.bfloat16()), target)
    assert max(4 * box.volume for _, box in source.reads) <= piece


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_filled_whatever_autograd_thinks_of_them(dtype: str) -> None:
    """Leaves that want gradients are, and so are tensors born under inference mode."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    source = _Source(values, "float32")
    leaf = torch.nn.Parameter(torch.zeros(5, 4, dtype=getattr(torch, dtype)))
    fill([("t", leaf, TILING)], source, {"a": SHAPE})
    assert leaf.requires_grad
    assert leaf.grad_fn is None
    with torch.inference_mode():
        born = torch.zeros(5, 4, dtype=getattr(torch, dtype))
        fill([("t", born, TILING)], source, {"a": SHAPE})
    assert torch.equal(expected(values.to(born.dtype)), leaf.detach())
    assert torch.equal(expected(values.to(born.dtype)), born)


TIED = ModelSpec(
    hidden_size=40,
    num_attention_heads=8,
    kv_channels=6,
    vocab_size=131,
    max_position_embeddings=512,
    layernorm_epsilon=1e-5,
    rope=RopeSpec(rotary_base=500000.0, scaling=None),
    share_embeddings_and_output_weights=True,
    params_dtype="float32",
    blocks=(
        BlockSpec(
            attention=GroupedQueryAttention(num_query_groups=2), ffn=SwiGLU(ffn_hidden_size=56)
        ),
    )
    * 2,
    heterogeneous_block_specs=False,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_rank_reads_each_of_its_bytes_once_and_no_others(
    tp: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No box is read twice, all together are the rank's parameters, and the progress says so."""
    monkeypatch.setattr(bridge.loading, "_PIECE", 1000)
    shapes = hf_tensors(TIED)
    table = parameters(TIED, padded_vocab_size=136)
    for tp_rank in range(tp):
        source = _Source({name: torch.ones(shape) for name, shape in shapes.items()}, "float32")
        wanted = [
            (name, torch.empty(tiling.shape, dtype=getattr(torch, dtype)), tiling)
            for name, parameter in table.items()
            for tiling in [parameter.shard(tp_rank, tp)]
        ]
        done: list[int] = []
        fill(wanted, source, shapes, advance=done.append)
        times = {name: np.zeros(shape, int) for name, shape in shapes.items()}
        for name, box in source.reads:
            times[name][box.slices] += 1
        assert max(one.max() for one in times.values()) == 1
        # What is one was read, what is zero is padding: 5 rows, all of them the last rank's.
        padding = 5 * 40 if tp_rank == tp - 1 else 0
        assert sum(int((tensor == 0).sum()) for _, tensor, _ in wanted) == padding
        held = sum(tensor.numel() for _, tensor, _ in wanted)
        assert sum(int(one.sum()) for one in times.values()) == held - padding
        assert sum(done) == 4 * (held - padding)
        assert len(done) == len(source.reads) > len(wanted)


def test_files_are_read_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are taken in the order of the source and not of the model."""
    monkeypatch.setattr(bridge.loading, "_PIECE", 32)
    source = _Source(
        {"z": torch.ones(4, 4), "a": torch.ones(2, 4), "m": torch.ones(2, 4)}, "float32"
    )
    wanted = [
        (name, torch.zeros(n, 4), rows(name, n)) for name, n in {"m": 2, "a": 2, "z": 4}.items()
    ]
    shapes = {"z": (4, 4), "a": (2, 4), "m": (2, 4)}
    fill(wanted, source, shapes, limits=TransferLimits(threads=1))
    assert [(name, box.starts[0]) for name, box in source.reads] == [
        ("z", 0),
        ("z", 2),
        ("a", 0),
        ("m", 0),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_many_threads_read_at_once_as_the_limit_says(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pieces are being read at the same moment: each read waits for two others."""
    monkeypatch.setattr(bridge.loading, "_PIECE", 16)
    together = threading.Barrier(3, timeout=20)
    source = _Source(torch.ones(9, 4), "float32", together.wait)
    target = torch.zeros(9, 4, dtype=getattr(torch, dtype))
    fill([("t", target, rows("a", 9))], source, {"a": (9, 4)}, limits=TransferLimits(threads=3))
    assert len(source.reads) == 9
    assert bool((target == 1).all())


class _Cut:
    """Fails, or sees the user's Ctrl-C, at the n-th read; what is read after it is counted."""

    def __init__(self, at: int, action: Callable[[], object]) -> None:
        self.at, self.action, self.count = at, action, 0
        self.lock = threading.Lock()

    def __call__(self) -> None:
        with self.lock:
            self.count += 1
            here = self.count == self.at
        if here:
            self.action()
        elif self.count > self.at:
            time.sleep(0.0005)  # whoever waits for the threads must get a word in between


def _corrupt() -> None:
    raise CorruptFileError("the file ends at byte 7", where="model.safetensors")


def _ctrl_c() -> None:
    """As a terminal sends it: a simulated interrupt does not wake a main thread that waits."""
    time.sleep(1)  # until then it starts threads, and a pool that is cut there raises its own error
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("action", "error"), [(_corrupt, CorruptFileError), (_ctrl_c, KeyboardInterrupt)]
)
def test_an_error_ends_the_work_and_is_raised(
    action: Callable[[], object],
    error: type[BaseException],
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A damaged file or Ctrl-C stops all threads after the pieces they are at."""
    monkeypatch.setattr(bridge.loading, "_PIECE", 16)
    cut = _Cut(5, action)
    source = _Source(torch.ones(100_000, 4), "float32", cut)
    target = torch.zeros(100_000, 4, dtype=getattr(torch, dtype))
    gc.disable()  # an interrupt in a callback of the collector's, such as Hypothesis's, is lost
    try:
        with pytest.raises(error):
            fill([("t", target, rows("a", 100_000))], source, {"a": (100_000, 4)})
    finally:
        gc.enable()
    assert 5 <= cut.count < 100_000
    left = [thread for thread in threading.enumerate() if thread.name.startswith("fill")]
    for thread in left:
        thread.join(60)
    assert not any(thread.is_alive() for thread in left)


def test_an_error_of_the_progress_is_raised_too() -> None:
    """Whoever watches may call the work off."""

    def enough(_: int) -> None:
        raise RuntimeError("called off")

    with pytest.raises(RuntimeError, match="called off"):
        fill(
            [("t", torch.ones(5, 4), TILING)],
            _Source(torch.ones(SHAPE), "float32"),
            {"a": SHAPE},
            advance=enough,
        )


def test_nothing_is_read_when_something_is_wrong() -> None:
    """A tensor that is larger than it should be is refused though every tile would fit."""
    source = _Source(torch.zeros(7, 4), "float32")
    target = torch.ones(5, 4)
    with pytest.raises(
        AccountingError, match="1 tensors are not as the model needs them"
    ) as caught:
        fill([("t", target, TILING)], source, {"a": SHAPE})
    assert caught.value.where == ("a: shape (7, 4), the model's is (6, 4)",)
    assert source.reads == []
    assert torch.equal(torch.ones(5, 4), target)


def test_integers_are_not_weights() -> None:
    """A quantized tensor has a scale somewhere; casting its codes would be wrong."""
    source = _Source(torch.zeros(SHAPE, dtype=torch.int8), "float8_e4m3fn")
    with pytest.raises(DtypeMismatchError, match="only floating-point"):
        fill([("t", torch.ones(5, 4), TILING)], source, {"a": SHAPE})
