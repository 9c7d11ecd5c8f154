"""A bundle on disk: a directory that holds everything needed to run a model, and nothing else.

manifest.json                 ``dyexport.bundle.manifest``; includes the hashes of all files, its own too
graphs/segment-00.onnx ...    one graph per segment, weights by reference into the store
graphs/conditioning.onnx      computes what depends on t and the label only; runs once for all steps
graphs/dense.onnx             the static model, for comparison (optional), with its own conditioning if it differs
graphs/weights.bin            the weight store
calibration/widths.safetensors, calibration/tokens.safetensors
calibration/ranges.json       largest input magnitudes of quantized linear layers
golden.safetensors            inputs and the outputs of the masked model, for ``dyexport verify``; absent in old bundles
budgets/0.3/ ...              of a bundle of several budgets: the manifest, calibration and golden data of another one;
                              budgets/0.3-2 once engines were added
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dyexport.bundle.manifest import FileRecord, Manifest
from dyexport.bundle.manifest_file import MANIFEST, TOKENS, WIDTHS, check_folder, read_manifest
from dyexport.bundle.plan import ALLOCATES
from dyexport.bundle.records import REPLACE
from dyexport.bundle.tables import BoolArray, TokenStats, WidthTable
from dyexport.bundle.targets import TARGETS
from dyexport.digests import sha256_of
from dyexport.errors import BundleError, TargetError, UsageError


class Stamp(NamedTuple):
    """Identity of a file and its contents: a replaced or rewritten file has another stamp."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        status = path.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @classmethod
    def find(cls, path: Path) -> Stamp | None:
        """Return the stamp of a file, or None if it cannot be read."""
        try:
            return cls.of(path)
        except OSError:
            return None


@dataclass(frozen=True, repr=False)
class Bundle:
    """An opened bundle. Use ``Bundle.open``, which checks it. ``stamps`` are of its files at that time.

    ``root`` is the folder of its manifest, and ``base`` the one that paths are relative to. They differ for a budget
    other than the default of a bundle of several.
    """

    root: Path
    manifest: Manifest
    stamps: dict[str, Stamp] = field(default_factory=dict)

    @classmethod
    def open(cls, root: str | Path, *, budget: float | None = None, check_hashes: bool = True) -> Bundle:
        """Read the manifest and check every file against it, and the tables against the plan.

        ``budget`` is one of a bundle of several; None: that of the manifest at ``root``, by default the default one.

        Raises ``BundleError`` for a missing, truncated or altered file, a path outside the bundle,
        or a schema newer than this version of dyexport reads, and ``UsageError`` for a budget that it lacks.
        """
        check_folder(Path(root))  # by the name that was given, which may be one on the hub
        root = Path(os.path.realpath(root))
        if budget is not None:
            root = root_at(root, budget)
        before = Stamp.find(root / MANIFEST)
        bundle = cls(root, read_manifest(root / MANIFEST))
        for name, record in bundle.manifest.files.items():
            bundle._check(name, record, check_hashes)
        bundle._check_tables()
        if Stamp.find(root / MANIFEST) != before:
            raise BundleError(f"{root} changed while it was read; load it again")
        return bundle

    def __repr__(self) -> str:
        manifest = self.manifest
        targets = ", ".join(dict.fromkeys(engine.target for engine in manifest.engines))
        budget = "" if manifest.budget is None else f" at {manifest.budget:g} of the FLOPs"
        engines = "static" if manifest.widths == "static" else f"K = {len(manifest.plan.segments)}"
        return f"Bundle({str(self.root)!r}, {manifest.model.name}{budget}, {engines}, {targets})"

    @property
    def base(self) -> Path:
        """The folder that paths of files are relative to."""
        return base_of(self.root, self.manifest)

    def whole(self) -> Bundle:
        """Return the bundle at its default budget, whose files are all files. Hashes are not checked again."""
        return self if self.base == self.root else Bundle.open(self.base, check_hashes=False)

    def at_each_budget(self) -> list[Bundle]:
        """Return the bundle at each of its budgets, the default one first. Hashes are not checked again."""
        default = self.whole()
        others = [budget for budget in default.manifest.budgets if budget != default.manifest.budget]
        return [default, *(Bundle.open(default.root, budget=budget, check_hashes=False) for budget in others)]

    def manifests(self) -> list[Manifest]:
        """Return the manifest of each budget, the default one's first."""
        return [bundle.manifest for bundle in self.at_each_budget()]

    @property
    def label(self) -> str:
        """The text in names of files and networks of one of several budgets: ``0.3``; '' in a bundle of one."""
        return f"{self.manifest.budget:g}" if self.manifest.budgets else ""

    def path(self, name: str) -> Path:
        """Return the path of a file of which each budget has one, such as its tables."""
        return self.base / self.manifest.place(name)

    @property
    def budgets(self) -> tuple[float, ...]:
        """All budgets of the bundle, ascending; () if it keeps the routers of a checkpoint."""
        one = () if self.manifest.budget is None else (self.manifest.budget,)
        return tuple(sorted(self.manifest.budgets)) or one

    def _check(self, name: str, record: FileRecord, check_hashes: bool) -> None:
        path = self.base / name
        try:
            real = Path(os.path.realpath(path, strict=True))
            if not self._holds(real):
                raise BundleError(f"{path} points outside the bundle")
            stamp = self.stamps[name] = Stamp.of(real)
            if not real.is_file():
                raise BundleError(f"{path} is not a file; {REPLACE}")
            if stamp.size != record.bytes:
                raise BundleError(f"{path} has {stamp.size} bytes instead of {record.bytes}; {REPLACE}")
            if check_hashes and sha256_of(real) != record.sha256:
                raise BundleError(f"{path} does not match its hash; {REPLACE}")
        except FileNotFoundError as error:
            raise BundleError(f"{path} is missing; {REPLACE}") from error
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}; {REPLACE}") from error

    def _holds(self, real: Path) -> bool:
        """Return whether a resolved file is in the bundle or among the files of its Hugging Face cache."""
        return real.is_relative_to(self.base) or real.parent == hub_blobs(self.base)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Read files of the opened bundle inside the context. Raises ``BundleError`` if any has changed."""
        self.check_unchanged(self.stamps)
        try:
            yield
        finally:
            self.check_unchanged(self.stamps)

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raise ``BundleError`` if files have changed since the bundle was opened."""
        for name in names:
            if not self._is_same(name):
                raise BundleError(f"{self.base / name} has changed since the bundle was loaded; load it again")

    def _is_same(self, name: str) -> bool:
        """Return False for a file with other contents; another name or owner does not count."""
        path, before = self.base / name, self.stamps[name]
        now = Stamp.find(path)
        if now is None or now == before:
            return now == before
        if now[:-1] != before[:-1] or _digest(path) != self.manifest.files[name].sha256:
            return False
        self.stamps[name] = now
        return True

    def _check_tables(self) -> None:
        """Check the tables against the plan."""
        try:
            check_widths(self.widths, self.manifest)
            if (stats := self.token_stats) is not None:
                check_tokens(stats, self.manifest)
        except BundleError as error:
            raise BundleError(f"{self.root}: {error}; {REPLACE}") from error

    def engine_paths(self, target: str) -> dict[str, Path]:
        """Return the engine files of one target, by network."""
        paths = {e.network: self.base / e.path for e in self.manifest.engines if e.target == target}
        if not paths:
            built = ", ".join(sorted({e.target for e in self.manifest.engines}))
            cure = f"run: dyexport compile {self.base} --target {target}"
            if target in TARGETS and TARGETS[target].static_tokens and self.manifest.plan.allocates:
                cure = f"build it with --token-path dynamic, since {target} cannot run the path {ALLOCATES!r}"
            raise TargetError(f"{self.root} has no {target!r} engines; it was built for {built}; {cure}")
        return paths

    @cached_property
    def widths(self) -> WidthTable:
        return WidthTable.load(self.path(WIDTHS))

    @cached_property
    def token_stats(self) -> TokenStats | None:
        return TokenStats.load(self.path(TOKENS)) if self.manifest.place(TOKENS) in self.manifest.files else None


def base_of(root: Path, manifest: Manifest) -> Path:
    """Return the folder that a manifest's paths are relative to; ``root`` is the manifest's own folder."""
    return root if manifest.folder is None else root.parents[manifest.folder.count("/")]


def root_at(root: Path, budget: float) -> Path:
    """Return the folder of a budget's manifest, from that of any.

    Raises ``UsageError`` for a budget that the bundle lacks, and ``BundleError`` for a folder that was not copied.
    """
    manifest = read_manifest(root / MANIFEST)
    base = base_of(root, manifest)
    if budget == manifest.budget:
        return root
    if budget not in manifest.budgets:
        raise UsageError(f"budget is {budget:g}; {base} {_known_budgets(manifest)}")
    folder = read_manifest(base / MANIFEST).folder_of(budget)
    if folder is None:
        return base
    if not os.path.lexists(base / folder / MANIFEST):
        raise BundleError(f"{base / folder / MANIFEST} is missing; {REPLACE}")
    return base / folder


def _digest(path: Path) -> str | None:
    """Hash a file; return None if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def _known_budgets(manifest: Manifest) -> str:
    if manifest.budget is None:
        return "has the routers of a checkpoint; leave the budget out"
    if not manifest.budgets:
        return f"has one budget, {manifest.budget:g}; leave the budget out, or build the bundle with several"
    return f"has {', '.join(f'{each:g}' for each in manifest.budgets)}; give one of these"


def hub_blobs(root: Path) -> Path | None:
    """Return the folder of files that ``models--ORG--NAME/snapshots/REVISION`` of the hub's cache links to."""
    for folder in (root, *root.parents):
        snapshots, repository = folder.parent, folder.parent.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs"
    return None


def check_widths(widths: WidthTable, manifest: Manifest) -> None:
    """Raise ``BundleError`` for a width table of other blocks or another range of t than the plan's."""
    if (widths.start, widths.end) != manifest.plan.span:
        raise BundleError(f"the width table covers {(widths.start, widths.end)}, the plan {manifest.plan.span}")
    for index, segment in enumerate(manifest.plan.segments):
        rows = widths.rows(segment.start, segment.end)
        _check_units(f"segment {index}", "head", widths.heads[rows], segment.heads)
        _check_units(f"segment {index}", "group", widths.groups[rows], segment.groups)


def _check_units(segment: str, kind: str, masks: BoolArray, kept: Sequence[Sequence[int]]) -> None:
    """Check that a segment lists every unit that masks (R, L, U) have on, and no unit that they lack."""
    _, depth, units = masks.shape
    if depth != len(kept):
        raise BundleError(f"the width table has {depth} blocks, {segment} has {len(kept)}")
    for block, listed in enumerate(kept):
        if max(listed) >= units:
            raise BundleError(f"{segment} has {kind} {max(listed)} in block {block}, the width table {units}")
        on = np.flatnonzero(masks[:, block].any(axis=0))
        if (missing := np.setdiff1d(on, listed)).size:
            raise BundleError(f"{segment} lacks {kind} {missing[0]} of block {block}, which the width table has on")


def check_tokens(stats: TokenStats, manifest: Manifest) -> None:
    """Raise ``BundleError`` for token counts of another model."""
    depth = manifest.plan.segments[0].depth
    if (stats.depth, stats.tokens) != (depth, manifest.model.tokens):
        raise BundleError(
            f"token counts are of {stats.depth} blocks and {stats.tokens} tokens, the plan is of {depth} and "
            f"{manifest.model.tokens}"
        )
