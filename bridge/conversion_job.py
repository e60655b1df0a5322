"""What both directions of a conversion share: its identity, and the passes over the data."""

from __future__ import annotations

import hashlib
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Literal

from bridge.casting import Loss, RoundedSource, refuse_overflow, rounding_note
from bridge.comparison import Digest, compare, compare_files, refuse_differences
from bridge.concurrently import both
from bridge.conversion import ConversionOptions, ConversionReport
from bridge.crew.protocol import Crew
from bridge.crew.sharing import share_of
from bridge.dtypes import Dtype
from bridge.errors import UsageError
from bridge.hashing import hash_files
from bridge.literals import AROUND, changed_literals
from bridge.manifest import Files, Manifest, entry_of
from bridge.padding import nonzero_padding
from bridge.plan import Plan
from bridge.progress import Advance
from bridge.read_side import ReadSide, aside
from bridge.reading import TransferLimits, read_bands
from bridge.rounding import round_by_definition
from bridge.sealing import is_done_already
from bridge.storage.journal import Job, fingerprint, job_of
from bridge.storage.new_checkpoint import NewCheckpoint
from bridge.storage.remote import Location, RemotePath
from bridge.storage.safetensors_layout import total_nbytes
from bridge.storage.source import FileLayout, TensorInfo, TensorSource
from bridge.storage.staging_directory import sweep
from bridge.storage.target import refuse_overlap
from bridge.tiling import Tiling


@dataclass(slots=True)
class ConversionJob:
    """The two passes over the data that both directions share, and their times.

    Every process of `crew` makes each call, writes and compares its share, and learns of all.
    """

    direction: Literal["hf_to_mcore", "mcore_to_hf"]
    source_path: Location
    target_path: Location
    plan: Plan
    options: ConversionOptions
    crew: Crew
    dtype: Dtype | None = None
    """To round to; None where every tensor is written as it is read."""
    losses: dict[str, Loss] = field(default_factory=dict)
    """What that cost, by tensor of the source."""
    convert_seconds: float = 0.0
    verify_seconds: float = 0.0
    peak_rss: int = 0
    hashes: Manifest = field(default_factory=Manifest)
    """Of what was written and compared so far; none with `--verify none`."""

    def job(
        self,
        read: ReadSide,
        layouts: Sequence[FileLayout],
        *,
        small: Sequence[bytes],
        beside: Mapping[str, str] | None = None,
        also: Mapping[str, str] | None = None,
    ) -> Job:
        """What this conversion makes, and from what.

        Args:
            read: The source.
            layouts: Every file of weights that it makes.
            small: What else decides its bytes.
            beside: Of `fingerprint`: other files that are read.
            also: Their hashes.

        Raises:
            UsageError: BR001, to be gone on with, and nothing would show that a file is damaged; or
                a file of the source is a link into the target.
        """
        refuse_overlap(self.target_path, (read.root / name for name in read.names))  # by links
        digests = b"".join(hashlib.sha256(one).digest() for one in small)
        resume, verify = self.options.resume, self.options.verify
        if resume and verify == "none" and isinstance(self.target_path, RemotePath):
            raise UsageError(
                "--resume of a target behind a URL takes files for complete by their size, and "
                "--verify none would not compare them",
                hint="leave --verify none away",
            )
        return job_of(
            layouts,
            {**fingerprint(read.root, read.names), **(beside or {})},
            resume=resume,
            direction=self.direction,
            plan=self.plan.digest(),
            dtype=self.dtype.name if self.dtype is not None else "as it is",
            other=hashlib.sha256(digests).hexdigest(),
            **(also or {}),
        )

    def done_already(self, read: ReadSide, job: Job) -> Manifest | None:
        """The target's manifest where an earlier attempt was killed after its last step."""
        if not self.options.resume:
            return None
        done = is_done_already(
            *(self.target_path, read, job), crew=self.crew, limits=self.options.limits,
            hashed=self.options.verify != "none", overwrite=self.options.overwrite,
        )  # fmt: skip
        if done is not None and isinstance(self.target_path, RemotePath):
            sweep(self.options.staging)  # what the attempt that was killed has left there
        return done

    def write(
        self,
        layouts: Sequence[FileLayout],
        new: NewCheckpoint,
        source: TensorSource,
        tilings: Mapping[str, Tiling],
        read: ReadSide,
    ) -> None:
        """Stream the weights into their files; all of them are complete when it returns.

        Meanwhile what the comparison does not hash is: Megatron's files, be they those that are
        written or those that are read, and what is small.

        Raises:
            DtypeMismatchError: BR303, values too large for the dtype to round to, all of them.
        """
        rounded = None if self.dtype is None else RoundedSource(source, self.dtype)
        limits, hashed = self.options.limits, self.options.verify != "none"
        if hashed:  # two things go on at once
            limits = replace(limits, memory_budget=limits.memory_budget // 2)
        behind = hashed and self.direction == "hf_to_mcore"
        compared = self._compared_files(read, layouts) if behind else ()
        beside = aside(read, without=compared, crew=self.crew)
        effort = sum(map(new.effort, layouts)) + (beside.total if hashed else 0)
        effort += sum(layout.size for layout in layouts) if behind else 0
        mine = share_of(self.crew, layouts, [layout.payload_nbytes for layout in layouts])

        def write(advance: Advance) -> Files:
            complete = [layout for layout in mine if new.is_complete(layout)]
            for layout in complete:
                if rounded is not None:
                    _round_again(layout, rounded, tilings, limits)
                advance(new.effort(layout))
            files = {layout.path: entry_of(layout) for layout in complete if behind}
            earlier = hash_files(
                new.written(), files, limits=limits, advance=advance, checksums=True
            )
            lacking = [layout for layout in mine if not new.is_complete(layout)]
            written = new.write_files(
                lacking, rounded or source, tilings, limits=limits, advance=advance, hashed=behind
            )
            return {**earlier, **written}

        started = time.perf_counter()
        with self.crew.phase(self.options.progress, "convert", effort) as advance:
            if hashed:
                written, found = both(write, partial(beside.hash, limits=limits), advance)
                self._add(found | Manifest(target=written))
            else:
                write(advance)
            self.peak_rss = sum(self.crew.gather(peak_rss()))
        self.convert_seconds = time.perf_counter() - started
        if rounded is not None:
            for share in self.crew.gather(rounded.losses):
                for name, loss in share.items():
                    self.losses[name] = self.losses.get(name, Loss()) + loss
            if not self.options.allow_overflow:
                refuse_overflow(self.losses, rounded.dtype)

    def _compared_files(self, read: ReadSide, layouts: Sequence[FileLayout]) -> Files:
        """The files whose bytes the comparison sees as they are, so that it can hash them.

        Hugging Face's, which hold their tensors whole and one after the other, unless it compares
        what they are rounded to.
        """
        if self.direction == "mcore_to_hf":
            return {layout.path: entry_of(layout) for layout in layouts}
        if self.dtype is not None:
            return {}
        return {name: entry for name, entry in read.files.items() if entry.parts}

    def _add(self, hashes: Manifest) -> None:
        """Learn of the hashes that every process has made."""
        for share in self.crew.gather(hashes):
            self.hashes |= share

    def verify(
        self,
        hf: TensorSource,
        megatron: TensorSource,
        *,
        read: ReadSide,
        layouts: Sequence[FileLayout],
        new: NewCheckpoint,
    ) -> dict[str, str]:
        """Compare both sides bit by bit as they lie on the disk, and hash Hugging Face's files.

        Where they differ in dtype, with the source's rounded once more and in another way. What
        lies around the tensors of the target is compared with what was laid out.

        Returns:
            sha256 of every HF tensor; where an import rounds, of what it was rounded to.

        Raises:
            VerificationError: BR305, with the first differing element of each tensor, or byte of
                each stretch around them.
        """
        if self.options.verify == "none":
            return {}
        started = time.perf_counter()
        if self.dtype is not None and self.direction == "hf_to_mcore":
            hf = RoundedSource(hf, self.dtype, rounding=round_by_definition)
        elif self.dtype is not None:
            megatron = RoundedSource(megatron, self.dtype, rounding=round_by_definition)
        tilings = self.plan.mcore_to_hf
        mine = share_of(self.crew, layouts, [len(layout.literals) for layout in layouts])
        total = sum(hf.tensors[name].nbytes for name in tilings)
        total += sum(len(data) for layout in layouts for _, data in layout.literals)
        with self.crew.phase(self.options.progress, "verify", total) as advance:
            found = self._compare(hf, megatron, read, layouts, new, advance)
            around = changed_literals(
                new.written(), mine, self.hashes.target,
                limits=self.options.limits, advance=advance,
            )  # fmt: skip
            shares = self.crew.gather((found, around, peak_rss()))
        self.verify_seconds += time.perf_counter() - started
        self.peak_rss = sum(peak for *_, peak in shares)
        by_name = {digest.name: digest for share, *_ in shares for digest in share}
        digests = [by_name[name] for name in tilings]
        wrong = [difference(self.plan, digest) for digest in digests if digest.num_different]
        refuse_differences(
            f"{len(wrong)} tensors differ from their source after reading them back", wrong
        )
        wrong = sorted(place for _, share, _ in shares for place in share)
        refuse_differences(AROUND, wrong)
        return {digest.name: digest.sha256 for digest in digests}

    def _compare(
        self,
        hf: TensorSource,
        megatron: TensorSource,
        read: ReadSide,
        layouts: Sequence[FileLayout],
        new: NewCheckpoint,
        advance: Advance,
    ) -> list[Digest]:
        """Compare this process's share: of the files that can be hashed, or of the tensors."""
        tilings, limits = self.plan.mcore_to_hf, self.options.limits
        files = self._compared_files(read, layouts)
        if not files:
            sizes = [hf.tensors[name].nbytes for name in tilings]
            some = {name: tilings[name] for name in share_of(self.crew, list(tilings), sizes)}
            return compare(hf, megatron, some, limits=limits, advance=advance)
        mine = share_of(self.crew, list(files), [one.nbytes for one in files.values()])
        is_import = self.direction == "hf_to_mcore"
        found, hashed = compare_files(
            hf, megatron, tilings,
            read.root if is_import else new.written(), {name: files[name] for name in mine},
            limits=limits, advance=advance,
        )  # fmt: skip
        self._add(Manifest(source=hashed) if is_import else Manifest(target=hashed))
        return found

    def verify_padding(self, megatron: TensorSource) -> None:
        """See that the rows which pad the vocabulary are zero as they lie on the disk.

        No HF tensor holds them, so comparing those does not look there; in Megatron they take part
        in the softmax of a training step.

        Raises:
            VerificationError: BR305, naming the parameters.
        """
        if self.options.verify == "none":
            return
        padded = [
            name
            for name, tiling in self.plan.hf_to_mcore.items()
            if any(tile.source is None for tile in tiling.tiles)
        ]
        mine = padded[self.crew.rank :: self.crew.size]
        found = self.crew.gather(
            nonzero_padding(self.plan, megatron, mine, limits=self.options.limits)
        )
        wrong = sorted(place for share in found for place in share)
        refuse_differences("the padding of the vocabulary is not zero after reading it back", wrong)

    def report(
        self,
        tensors: Mapping[str, TensorInfo],
        tilings: Mapping[str, Tiling],
        digests: Mapping[str, str],
        notes: Sequence[str],
    ) -> ConversionReport:
        """Sum up."""
        sources = {tile.source for tiling in tilings.values() for tile in tiling.tiles} - {None}
        loss = sum(self.losses.values(), Loss())
        num_parameters = sum(
            sum(tile.source_box.volume for tile in tiling.tiles if tile.source)
            for tiling in tilings.values()
        )
        if self.dtype is not None:
            notes = [rounding_note(loss, self.dtype, num_parameters), *notes]
        return ConversionReport(
            direction=self.direction,
            source=str(self.source_path),
            target=str(self.target_path),
            num_parameters=num_parameters,
            num_source_tensors=len(sources),
            num_target_tensors=len(tilings),
            nbytes=total_nbytes(tensors[name] for name in sources if name is not None),
            plan_sha256=self.plan.digest(),
            verified=bool(digests),
            convert_seconds=self.convert_seconds,
            verify_seconds=self.verify_seconds,
            workers=self.crew.size,
            peak_rss=self.peak_rss,
            rounding=None if self.dtype is None else {"dtype": self.dtype.name, **asdict(loss)},
            tensor_sha256=dict(digests),
            notes=tuple(notes),
        )


def _round_again(
    layout: FileLayout,
    rounded: RoundedSource,
    tilings: Mapping[str, Tiling],
    limits: TransferLimits,
) -> None:
    """Find out what rounding costs a file that an earlier attempt has written."""
    for payload in layout.payloads:
        tiling = tilings[payload.tensor]
        for _ in read_bands(
            rounded, tiling, payload.box, word=rounded.dtype.word, band_nbytes=limits.band_nbytes
        ):
            pass


def peak_rss() -> int:
    """The most memory that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def difference(plan: Plan, digest: Digest) -> str:
    """Say where an HF tensor differs: its element, and the Megatron element that holds it."""
    if digest.first_difference is None:
        return f"{digest.name}: equal"
    target, index = plan.mcore_to_hf[digest.name].locate(digest.first_difference)
    return (
        f"{digest.name}{list(digest.first_difference)} = {target}{list(index)}: "
        f"{digest.num_different} elements differ, this one first"
    )
