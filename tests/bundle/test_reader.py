"""Opening a bundle: whatever is wrong with it is one ``BundleError`` that names the file."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from dyexport.bundle.manifest import (
    CONDITIONING,
    DENSE,
    DENSE_CONDITIONING,
    SCHEMA_VERSION,
    EngineRecord,
    FileRecord,
    Manifest,
)
from dyexport.bundle.manifest_file import MANIFEST, RANGES, TOKENS, WEIGHTS, WIDTHS, seal
from dyexport.bundle.plan import Segment, SegmentPlan, segment_name
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import ModelSpec
from dyexport.bundle.tables import WidthTable
from dyexport.digests import sha256_of
from dyexport.errors import BundleError, EngineMismatchError, TargetError
from dyexport.files import remove
from tests.manifests import write_content
from tests.runtime.bundles import write_bundle

GRAPH = "graphs/segment-00.onnx"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A bundle of two blocks with one segment; its graph is only bytes."""
    root = tmp_path / "bundle"
    (root / "calibration").mkdir(parents=True)
    (root / "graphs").mkdir()
    on = np.ones((1, 2, 2), bool)
    WidthTable(grid=np.zeros(1), end=1.0, heads=on, groups=on).save(root / WIDTHS)
    (root / GRAPH).write_bytes(bytes(range(256)))
    (root / WEIGHTS).write_bytes(b"weights")
    write_content(root, manifest_of(root))
    return root


def manifest_of(root: Path) -> dict[str, Any]:
    both = ((0, 1), (0, 1))
    segment = Segment(
        start=0.0,
        end=1.0,
        heads=both,
        groups=both,
        gated_heads=(False, False),
        gated_groups=(False, False),
        token_paths=("all", "all"),
        capacities=(0, 0),
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        dyexport_version="0",
        model=ModelSpec(
            name="m",
            backbone="sit",
            objective="flow",
            timestep_range=(0.0, 1.0),
            latent_shape=(1, 2, 2),
            tokens=4,
            classes=2,
            pixel_space=True,
            config={"in_channels": 1, "sample_size": 2, "num_embeds_ada_norm": 2},
        ),
        budget=0.5,
        plan=SegmentPlan(
            segments=(segment,),
            flops_ratio=0.5,
            network_flops_ratio=0.5,
            executed_flops_ratio=0.5,
            disk_bytes=1,
            resident_bytes=1,
        ),
        engines=(EngineRecord(target="onnx", network=segment_name(0), path=GRAPH),),
        reference=None,
        metrics={},
        files={
            name: FileRecord(sha256=sha256_of(root / name), bytes=(root / name).stat().st_size)
            for name in (GRAPH, WEIGHTS, WIDTHS)
        },
    )
    content: dict[str, Any] = manifest.model_dump(mode="json")
    return content


def test_a_bundle_opens(root: Path) -> None:
    bundle = Bundle.open(root)
    assert bundle.engine_paths("onnx") == {"segment-00": root / GRAPH}
    assert bundle.widths.heads.shape == (1, 2, 2)
    assert bundle.token_stats is None
    with pytest.raises(EngineMismatchError, match="no 'tensorrt' engines; it was built for onnx"):
        bundle.engine_paths("tensorrt")


@pytest.mark.parametrize("name", [GRAPH, WIDTHS])
def test_any_flipped_bit_is_found(root: Path, name: str) -> None:
    content = bytearray((root / name).read_bytes())
    for position in (0, len(content) // 2, len(content) - 1):
        content[position] ^= 1
        (root / name).write_bytes(content)
        with pytest.raises(BundleError, match=f"{name} does not match its hash"):
            Bundle.open(root)
        content[position] ^= 1
    (root / name).write_bytes(content)
    Bundle.open(root)


@pytest.mark.build
def test_any_flipped_bit_of_the_manifest_is_found(root: Path) -> None:
    """A thousand bits of a short manifest: none is read as something else, whether it still parses or not."""
    content = (root / MANIFEST).read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), 1000):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (root / MANIFEST).write_bytes(flipped)
        with pytest.raises(BundleError, match="manifest"):
            Bundle.open(root, check_hashes=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"tokens": 4', '"tokens": 9', 1),
        lambda text: text.replace('"budget": 0.5', '"budget": 0.50', 1),
        lambda text: text.replace('"tokens": 4', '"tokens": 9, "tokens": 4', 1),
        lambda text: text.replace(": ", ":", 1),
        lambda text: text + "\n",
    ],
)
def test_a_manifest_that_was_edited_is_refused(root: Path, change: Callable[[str], str]) -> None:
    """Even where it says the same: a reader that parses first cannot tell."""
    before = (root / MANIFEST).read_text()
    after = change(before)
    assert after != before
    (root / MANIFEST).write_text(after)
    with pytest.raises(BundleError, match="was changed after it was written"):
        Bundle.open(root, check_hashes=False)


def test_a_truncated_file_is_found_without_hashing(root: Path) -> None:
    os.truncate(root / GRAPH, 255)
    with pytest.raises(BundleError, match=r"has 255 bytes instead of 256; copy the bundle again, or build it again"):
        Bundle.open(root, check_hashes=False)


def test_a_missing_file_is_named(root: Path) -> None:
    (root / GRAPH).unlink()
    with pytest.raises(BundleError, match=r"segment-00\.onnx is missing"):
        Bundle.open(root)


def test_a_directory_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret", "graphs/../../secret", "C:\\secret", "c:secret", "a\0b", ""]
)
def test_a_manifest_names_only_what_is_inside(root: Path, path: str) -> None:
    (root.parent / "secret").write_text("!")
    for place in ("files", "engines"):
        manifest = manifest_of(root)
        if place == "files":
            manifest["files"][path] = manifest["files"][GRAPH]
        else:
            manifest["engines"][0]["path"] = path
        write_content(root, manifest)
        with pytest.raises(BundleError, match="points outside the bundle"):
            Bundle.open(root)


def test_a_link_out_of_the_bundle_is_refused(root: Path) -> None:
    outside = root.parent / "outside.onnx"
    (root / GRAPH).rename(outside)
    (root / GRAPH).symlink_to(outside)
    with pytest.raises(BundleError, match="points outside the bundle"):
        Bundle.open(root)


def _newer(manifest: dict[str, Any]) -> None:
    manifest["schema_version"] = SCHEMA_VERSION + 1
    manifest["something"] = "new"


def _older(manifest: dict[str, Any]) -> None:
    """As schema 1 had it: engines by the number of their segment."""
    manifest["schema_version"] = 1
    manifest["engines"] = [{"target": "onnx", "segment": 0, "path": GRAPH}]


def _gap(manifest: dict[str, Any]) -> None:
    first = manifest["plan"]["segments"][0]
    manifest["plan"]["segments"] = [{**first, "end": 0.4}, {**first, "start": 0.5}]


def _depths(manifest: dict[str, Any]) -> None:
    first = manifest["plan"]["segments"][0]
    shallow = {key: value[:1] if isinstance(value, list) else value for key, value in first.items()}
    manifest["plan"]["segments"] = [{**first, "end": 0.5}, {**shallow, "start": 0.5}]


def _segment(**values: Any) -> Change:
    """A change of the only segment."""
    return lambda manifest: manifest["plan"]["segments"][0].update(values)


def _engine(**values: Any) -> Change:
    """A second engine that is the first one but for ``values``."""
    return lambda manifest: manifest["engines"].append({**manifest["engines"][0], **values})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_newer, f"has schema {SCHEMA_VERSION + 1}, this dyexport reads up to {SCHEMA_VERSION}; upgrade dyexport"),
        (_older, "has schema 1, of an older dyexport; build the bundle again"),
        (lambda m: m.pop("schema_version"), "is not a dyexport manifest"),
        (lambda m: m.update(schema_version="1"), "is not a dyexport manifest"),
        (lambda m: m.pop("plan"), "plan: Field required"),
        (lambda m: m.update(surprise=1), "surprise: Extra inputs"),
        (lambda m: m["engines"][0].update(network="segment-01"), "is of 'segment-01', which is not in the plan"),
        (lambda m: m["engines"][0].update(network="turbo"), "is of 'turbo', which is not in the plan"),
        (lambda m: m["engines"][0].update(segment=0), "segment: Extra inputs"),
        (lambda m: m["files"].pop(GRAPH), "has no hash"),
        (lambda m: m["plan"].update(segments=[]), "a plan needs at least one segment"),
        (_gap, "segments leave a gap or overlap at t = 0.4"),
        (_depths, "segments have 2 and 1 blocks"),
        (_segment(heads=[[0, 0], [0, 1]]), "none twice"),
        (_segment(groups=[[1, 1], [0, 1]]), "none twice"),
        (_segment(heads=[[], [0, 1]]), "at least one"),
        (_segment(heads=[[0, -1], [0, 1]]), "greater than or equal to 0"),
        (_segment(heads=[[0, 2], [0, 1]]), "segment 0 has head 2 in block 0, the width table 2"),
        (_segment(groups=[[0, 1], [7, 0]]), "segment 0 has group 7 in block 1, the width table 2"),
        (_segment(heads=[[0], [0, 1]]), "segment 0 lacks head 1 of block 0, which the width table has on"),
        (_segment(groups=[[0, 1], [1]]), "segment 0 lacks group 0 of block 1, which the width table has on"),
        (_segment(capacities=[-1, 0]), "greater than or equal to 0"),
        (_segment(capacities=[0, 5]), "a capacity of 5 is more than 4 tokens"),
        (_segment(token_paths=["dynamic", "all"], slot_buckets=[2, 2]), "must ascend"),
        (_segment(token_paths=["dynamic", "all"], slot_buckets=[2, 1]), "must ascend"),
        (_segment(token_paths=["dynamic", "all"], slot_buckets=[0, 1]), "greater than 0"),
        (_segment(token_paths=["dynamic", "all"], slot_buckets=[1]), f"names no {TOKENS}"),
        (_segment(end=0.9), "the plan covers"),
        (lambda m: m["model"].update(timestep_range=[0.0, 2.0]), "the plan covers"),
        (lambda m: (m["model"].update(timestep_range=[0.0, 2.0]), _segment(end=2.0)(m)), "the width table covers"),
        (lambda m: m["model"].update(tokens=0), "greater than 0"),
        (lambda m: m["model"].update(latent_shape=[1, 0, 2]), "greater than 0"),
        (lambda m: m["model"].update(quantization="int8"), f"names no {RANGES}"),
        (lambda m: m["files"].pop(WEIGHTS), f"names no {WEIGHTS}"),
        (lambda m: m["files"].pop(WIDTHS), f"names no {WIDTHS}"),
        (_engine(path=WEIGHTS), "'onnx' has two engines of 'segment-00'"),
        (_engine(network=CONDITIONING), "is the engine of two networks"),
        (_engine(target="torch-tensorrt"), "is the engine of two networks"),
        (lambda m: m.update(budget=1.5), "less than or equal to 1"),
        (lambda m: m["plan"].update(merge_errors=[0.0, 0.0]), "2 errors are of 1 segments"),
        (lambda m: m["plan"].update(disk_bytes=-1), "greater than or equal to 0"),
    ],
)
def test_a_manifest_that_is_wrong(root: Path, change: Change, message: str) -> None:
    manifest = manifest_of(root)
    change(manifest)
    write_content(root, manifest)
    with pytest.raises(BundleError, match=message):
        Bundle.open(root)


@pytest.mark.parametrize("text", ["", "{", "[]", '"manifest"', '{"schema_version": true, "x": [1', "null", "1e999"])
def test_a_manifest_that_is_no_manifest(root: Path, text: str) -> None:
    (root / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="manifest"):
        Bundle.open(root)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 5000])
@pytest.mark.parametrize("place", ['"budget":0.5', '"flops_ratio":0.5', '"metrics":{}'])
def test_numbers_are_finite(root: Path, number: str, place: str) -> None:
    text = json.dumps(manifest_of(root), separators=(",", ":"))
    after = text.replace(place, place.partition(":")[0] + (":" + number if "{" not in place else f':{{"a":{number}}}'))
    assert after != text
    (root / MANIFEST).write_bytes(seal(after))
    with pytest.raises(BundleError, match="manifest"):
        Bundle.open(root)


def test_a_manifest_that_is_nested_without_end(root: Path) -> None:
    text = json.dumps(manifest_of(root))
    nested = text.replace('"config": {', '"config": {"a": ' + "[" * 100_000 + "]" * 100_000 + ", ")
    assert nested != text
    (root / MANIFEST).write_bytes(seal(nested))
    with pytest.raises(BundleError, match="recursion"):
        Bundle.open(root)


def test_a_manifest_of_any_size_is_not_read(root: Path) -> None:
    os.truncate(root / MANIFEST, 2**33)
    with pytest.raises(BundleError, match="more than"):
        Bundle.open(root)


@pytest.mark.parametrize("name", [MANIFEST, GRAPH, WIDTHS, "graphs"])
def test_a_loop_of_links_is_a_damaged_bundle(root: Path, name: str) -> None:
    remove(root / name)
    (root / name).symlink_to(root / name)
    with pytest.raises(BundleError, match=name):
        Bundle.open(root)


@pytest.mark.parametrize("name", [MANIFEST, GRAPH, WIDTHS])
def test_a_folder_or_pipe_in_place_of_a_file(root: Path, name: str) -> None:
    for make in (os.mkdir, os.mkfifo):
        remove(root / name)
        make(root / name)
        with pytest.raises(BundleError, match=name):
            Bundle.open(root)


def test_a_file_in_place_of_a_folder(root: Path) -> None:
    remove(root / "graphs")
    (root / "graphs").write_text("")
    with pytest.raises(BundleError, match="graphs"):
        Bundle.open(root)


def _table(**arrays: np.ndarray) -> bytes:
    on = np.ones((1, 2, 2), bool)
    return save({"grid": np.zeros(1), "end": np.ones(1), "heads": on, "groups": on, **arrays})


def _counts(**arrays: np.ndarray) -> bytes:
    counts = {"grid": np.zeros(1), "levels": np.ones(1), "counts": np.ones((1, 2, 1)), "mean": np.ones((1, 2))}
    return save({**counts, "tokens": np.array([4]), **arrays})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (WIDTHS, _table(grid=np.zeros(1, np.float32))),
        (WIDTHS, _table(grid=np.zeros((1, 1)))),
        (WIDTHS, _table(grid=np.full(1, -1.0))),
        (WIDTHS, _table(end=np.zeros(0))),
        (WIDTHS, _table(end=np.full(1, np.nan))),
        (WIDTHS, _table(end=np.full(1, 2.0))),
        (WIDTHS, _table(heads=np.ones((1, 2, 2), np.uint8))),
        (WIDTHS, _table(heads=np.ones((1, 3, 2), bool))),
        (WIDTHS, _table(heads=np.ones((1, 3, 2), bool), groups=np.ones((1, 3, 2), bool))),
        (WIDTHS, _table(heads=np.ones((1, 2, 1), bool))),
        (WIDTHS, _table(groups=np.ones((1, 2, 3), bool))),
        (WIDTHS, save({"grid": np.zeros(1)})),
        (WIDTHS, b"\xff" * 100),
        (TOKENS, _counts(levels=np.ones(2))),
        (TOKENS, _counts(levels=np.array([1.0, 0.5]), counts=np.ones((1, 2, 2)))),
        (TOKENS, _counts(grid=np.zeros(2))),
        (TOKENS, _counts(mean=np.ones((1, 3)), counts=np.ones((1, 3, 1)))),
        (TOKENS, _counts(counts=np.full((1, 2, 1), np.nan))),
        (TOKENS, _counts(counts=np.full((1, 2, 1), 5.0))),
        (TOKENS, _counts(mean=np.full((1, 2), -1.0))),
        (TOKENS, _counts(tokens=np.array([3]))),
        (TOKENS, _counts(tokens=np.zeros(0))),
        (TOKENS, _counts(counts=np.ones((1, 2, 1), np.float32))),
    ],
)
def test_tables_are_of_the_plan(root: Path, name: str, content: bytes) -> None:
    """Another dtype, shape, depth, range of t or number of tokens; all hashed as they are."""
    for each in (_table() if name == WIDTHS else _counts(), content):
        (root / name).write_bytes(each)
        manifest = manifest_of(root)
        manifest["files"][name] = {"sha256": sha256_of(root / name), "bytes": len(each)}
        write_content(root, manifest)
        with pytest.raises(BundleError) if each == content else nullcontext():
            Bundle.open(root)


def test_a_manifest_that_is_not_text(root: Path) -> None:
    (root / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="cannot read"):
        Bundle.open(root)


def test_engines_are_of_networks_by_name(root: Path) -> None:
    manifest = manifest_of(root)
    networks = [segment_name(0), CONDITIONING, DENSE, DENSE_CONDITIONING]
    paths = {name: f"graphs/{name}.onnx" for name in networks}
    for name in [*paths.values(), "graphs/conditioning.pt2"]:
        (root / name).write_bytes((root / GRAPH).read_bytes())
        manifest["files"][name] = manifest["files"][GRAPH]
    manifest["engines"] = [{"target": "onnx", "network": name, "path": path} for name, path in paths.items()]
    manifest["engines"].append({"target": "torch-tensorrt", "network": CONDITIONING, "path": "graphs/conditioning.pt2"})
    write_content(root, manifest)
    bundle = Bundle.open(root)
    assert bundle.engine_paths("onnx") == {name: root / path for name, path in paths.items()}
    assert bundle.engine_paths("torch-tensorrt") == {CONDITIONING: root / "graphs/conditioning.pt2"}


def test_blocks_with_limited_room(root: Path) -> None:
    (segment,) = Bundle.open(root).manifest.plan.segments
    assert segment.limited_blocks == ()
    paths = ("capacity", "masked")
    assert segment.model_copy(update={"token_paths": paths}).limited_blocks == (0,)
    paths = ("compact", "dynamic")
    assert segment.model_copy(update={"token_paths": paths}).limited_blocks == (1,)


def test_every_t_of_the_range_has_a_segment(root: Path) -> None:
    plan = Bundle.open(root).manifest.plan
    assert [plan.segment_for(t) for t in (0.0, 0.5, 1.0)] == [0, 0, 0]
    with pytest.raises(EngineMismatchError, match=r"timestep 1\.5 is outside \[0, 1\]"):
        plan.segment_for(1.5)


def test_engines_that_cannot_be_compiled_are_not_advised(tmp_path: Path) -> None:
    compact = Bundle.open(write_bundle(tmp_path / "compact", segments=2, path="compact").root)
    with pytest.raises(TargetError, match=r"build it with --token-path dynamic, since tensorrt-rtx cannot run"):
        compact.engine_paths("tensorrt-rtx")
    for bundle, target in ((compact, "torch"), (Bundle.open(write_bundle(tmp_path / "all").root), "tensorrt-rtx")):
        with pytest.raises(TargetError, match=f"run: dyexport compile .* --target {target}"):
            bundle.engine_paths(target)
