"""A bundle whose every hash is right, and whose parts are not of one another, is refused before it runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
import pytest

from dyexport.bundle.manifest import CONDITIONING, DENSE_CONDITIONING, EngineRecord
from dyexport.bundle.manifest_file import MANIFEST, read_manifest
from dyexport.bundle.plan import segment_name
from dyexport.bundle.plan_info import INFO
from dyexport.bundle.reader import Bundle
from dyexport.bundle.targets import TARGETS, plan_targets
from dyexport.engines.networks import GRAPH_HASHES, check_networks
from dyexport.errors import BundleError, DyexportError, EngineBuildError
from tests.engines.test_tensorrt_rt import info
from tests.engines.tiny import Store, make_weights, write_conditioning_onnx
from tests.manifests import forge, relabel
from tests.pipeline.tiny import tamper
from tests.runtime.bundles import write_bundle, write_manifest

GRAPH = f"graphs/{segment_name(0)}.onnx"
Content = dict[str, Any]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a conditioning network for the dense one, whose weights are in a file of their own."""
    root = tmp_path_factory.mktemp("pristine") / "bundle"
    bundle = write_bundle(root)
    path = f"graphs/{DENSE_CONDITIONING}.onnx"
    write_conditioning_onnx(root / path, make_weights(seed=1), Store(root / "graphs/own.bin"))
    engines = read_manifest(root / MANIFEST).engines
    record = EngineRecord(target="onnx", network=DENSE_CONDITIONING, path=path)
    write_manifest(root, bundle.spec, bundle.plan, [*engines, record])
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def check(root: Path) -> None:
    check_networks(Bundle.open(root), "onnx")


def test_a_whole_bundle_passes(root: Path) -> None:
    check(root)


def swap(*networks: str) -> Callable[[Content], None]:
    """Each of two networks has the other's file."""

    def change(manifest: Content) -> None:
        first, second = (next(e for e in manifest["engines"] if e["network"] == name) for name in networks)
        first["path"], second["path"] = second["path"], first["path"]

    return change


@pytest.mark.parametrize(
    "networks",
    [(CONDITIONING, DENSE_CONDITIONING), (segment_name(0), segment_name(1)), (segment_name(2), CONDITIONING)],
)
def test_a_graph_is_not_taken_for_another(root: Path, networks: tuple[str, str]) -> None:
    forge(root, swap(*networks))
    with pytest.raises(BundleError, match=f"is of '{networks[1]}', and the manifest has it as '{networks[0]}'"):
        check(root)


def test_the_dense_network_does_not_condition_the_others(root: Path) -> None:
    """Its record is gone, and its file is in the place of the one that segments need."""

    def change(manifest: Content) -> None:
        swap(CONDITIONING, DENSE_CONDITIONING)(manifest)
        manifest["engines"] = [each for each in manifest["engines"] if each["network"] != DENSE_CONDITIONING]

    forge(root, change)
    with pytest.raises(BundleError, match=f"is of '{DENSE_CONDITIONING}'"):
        check(root)


def segment(**values: Any) -> Callable[[Content], None]:
    return lambda manifest: manifest["plan"]["segments"][0].update(values)


def reverse_heads(manifest: Content) -> None:
    heads = manifest["plan"]["segments"][0]["heads"]
    block = next(block for block, kept in enumerate(heads) if len(kept) > 1)
    heads[block] = heads[block][::-1]


def add_group(manifest: Content) -> None:
    """Of a block that has not all of them."""
    groups = next(kept for each in manifest["plan"]["segments"] for kept in each["groups"] if len(kept) < 4)
    groups.append(min({0, 1, 2, 3} - set(groups)))


def move_bound(manifest: Content) -> None:
    """By less than a row of the width table, whose units both segments then have."""
    first, second = manifest["plan"]["segments"][:2]
    first["end"] = second["start"] = first["end"] - 1e-9


def model(**values: Any) -> Callable[[Content], None]:
    return lambda manifest: manifest["model"].update(values)


def relearn(manifest: Content) -> None:
    """Fewer classes, in both of the places that say so."""
    manifest["model"]["classes"] = manifest["model"]["config"]["num_embeds_ada_norm"] = 9


@pytest.mark.parametrize(
    "change",
    [
        reverse_heads,
        add_group,
        segment(gated_heads=[False, True]),
        segment(gated_groups=[False, False]),
        segment(token_paths=["masked", "all"]),
        segment(capacities=[1, 1]),
        segment(merged=True),
        relearn,
        model(objective="flow"),
        model(backbone="sit"),
        model(precision="bf16"),
        model(latent_shape=[2, 2, 3]),
        model(pixel_space=False),
        lambda manifest: manifest["model"]["config"].update(patch_size=2),
    ],
)
def test_a_graph_is_of_the_models_and_segment_that_it_was_made_for(
    root: Path, change: Callable[[Content], None]
) -> None:
    forge(root, change)
    with pytest.raises(BundleError, match="was made for another model or segment"):
        check(root)
    relabel(root)
    check(root)


def test_bounds_between_segments_are_the_graphs(root: Path) -> None:
    forge(root, move_bound)
    with pytest.raises(BundleError):
        check(root)


def test_a_graph_that_says_nothing_is_refused(root: Path) -> None:
    def change(content: bytes) -> bytes:
        graph = onnx.load_from_string(content)
        del graph.metadata_props[:]
        return graph.SerializeToString()

    tamper(root, GRAPH, change)
    with pytest.raises(BundleError, match="is of None"):
        check(root)


def test_every_file_of_weights_is_in_the_manifest(root: Path) -> None:
    forge(root, lambda manifest: manifest["files"].pop("graphs/own.bin"))
    with pytest.raises(BundleError, match=r"has weights in graphs/own\.bin, which the manifest does not name"):
        check(root)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offset": "x"}, "not numbers of bytes"),
        ({"offset": "-4"}, "not numbers of bytes"),
        ({"offset": "1_0"}, "not numbers of bytes"),
        ({"offset": "9" * 30}, "not numbers of bytes"),
        ({"offset": "9" * 18}, "has weights up to byte"),
        ({"length": ""}, "not numbers of bytes"),
        ({"length": None}, "not numbers of bytes"),
        ({"length": "1e3"}, "not numbers of bytes"),
        ({"length": "99999999"}, "has weights up to byte"),
        ({"location": None}, "does not name its file"),
        ({"location": "."}, "does not name its file"),
        ({"location": "other.bin"}, "which the manifest does not name"),
        ({"location": "../../secret"}, "outside the bundle"),
    ],
)
def test_weights_lie_in_the_bundle(root: Path, fields: dict[str, str | None], message: str) -> None:
    def change(content: bytes) -> bytes:
        graph = onnx.load_from_string(content)
        weight = next(tensor for tensor in graph.graph.initializer if tensor.external_data)
        found = {**{entry.key: entry.value for entry in weight.external_data}, **fields}
        del weight.external_data[:]
        for key, value in found.items():
            if value is not None:
                weight.external_data.add(key=key, value=value)
        return graph.SerializeToString()

    tamper(root, GRAPH, change)
    with pytest.raises((BundleError, EngineBuildError), match=message):
        check(root)


def test_weights_that_are_said_to_lie_twice(root: Path) -> None:
    def change(content: bytes) -> bytes:
        graph = onnx.load_from_string(content)
        weight = next(tensor for tensor in graph.graph.initializer if tensor.external_data)
        weight.external_data.add(key="location", value="weights.bin")
        return graph.SerializeToString()

    tamper(root, GRAPH, change)
    with pytest.raises(EngineBuildError, match="does not name its file"):
        check(root)


def test_tensors_inside_of_nodes_lie_in_the_bundle(root: Path) -> None:
    """At any depth: here in a branch of a condition."""

    def change(content: bytes) -> bytes:
        graph = onnx.load_from_string(content)
        tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in {"location": "/etc/passwd", "offset": "0", "length": "4"}.items():
            tensor.external_data.add(key=key, value=value)
        constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
        branch = onnx.helper.make_graph([constant], "branch", [], [])
        graph.graph.node.append(onnx.helper.make_node("If", ["one"], ["y"], then_branch=branch, else_branch=branch))
        return graph.SerializeToString()

    tamper(root, GRAPH, change)
    with pytest.raises(EngineBuildError, match="outside the bundle"):
        check(root)


def test_a_graph_with_any_bit_flipped_is_refused_or_read(root: Path) -> None:
    """Its hash is right; whatever is then found of it is in one sentence."""
    content = (root / GRAPH).read_bytes()
    for bit in range(0, 8 * len(content), 97):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        tamper(root, GRAPH, lambda _, flipped=flipped: bytes(flipped))  # type: ignore[misc]
        with suppress(DyexportError):
            check(root)


def test_every_compiled_target_records_its_graph() -> None:
    assert GRAPH_HASHES.keys() == {name for name, target in TARGETS.items() if target.compiled}


@pytest.mark.parametrize("target", plan_targets(tuple(TARGETS)))
def test_a_plan_is_of_the_bundles_graph(root: Path, target: str) -> None:
    file = TARGETS[target].file
    bundle = read_manifest(root / MANIFEST)
    engines = list(bundle.engines)
    graphs = {engine.network: bundle.files[engine.path].sha256 for engine in engines}
    for name in graphs:
        folder = root / "engines" / target / name
        folder.mkdir(parents=True)
        (folder / file).write_bytes(name.encode())
        (folder / INFO).write_text(info(flavour=target, graph_sha256=graphs[name]).model_dump_json())
        engines.append(EngineRecord(target=target, network=name, path=f"engines/{target}/{name}/{file}"))
    write_manifest(root, bundle.model, bundle.plan, engines)
    check_networks(Bundle.open(root), target)
    paths = [f"engines/{target}/{segment_name(index)}/{file}" for index in range(2)]

    def exchange(manifest: Content) -> None:
        for engine in manifest["engines"]:
            if engine["path"] in paths:
                engine["path"] = paths[1 - paths.index(engine["path"])]

    forge(root, exchange)
    with pytest.raises(BundleError, match="was not built from the bundle's graph of 'segment-00'"):
        check_networks(Bundle.open(root), target)
