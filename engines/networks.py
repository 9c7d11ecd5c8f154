"""Checks that the engine files of a bundle are those of the networks that its manifest names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dyexport.bundle.graph_labels import NETWORK, labels_for
from dyexport.bundle.reader import Bundle
from dyexport.engines.base import WeightSpan
from dyexport.engines.onnx_file import read_graph
from dyexport.engines.registry import make_engines
from dyexport.engines.tensorrt_fit import plan_info
from dyexport.engines.torch_rt import graph_of, package_info
from dyexport.errors import BundleError

GRAPHS = "onnx"
PACKAGES = "torch"
GRAPH_HASHES: Mapping[str, Callable[[Path], str]] = {
    "tensorrt": lambda path: plan_info(path).graph_sha256,
    "tensorrt-rtx": lambda path: plan_info(path).graph_sha256,
    "torch": lambda path: package_info(path).graph_sha256,
    "torch-tensorrt": lambda path: plan_info(path).graph_sha256,
}
"""Targets whose engines record the hash of their graph."""


def check_networks(bundle: Bundle, target: str) -> None:
    """Compare the engines of a target with the manifest, without reading weights.

    Raises ``BundleError`` for a graph that was made for another network, segment or model, for a plan that was built
    from another graph than the bundle's, and for weights that are not in the bundle.
    """
    paths = bundle.engine_paths(target)
    for network, path in paths.items():
        if target == GRAPHS:
            _check_graph(bundle, network, path)
        elif target in GRAPH_HASHES:
            _check_plan(bundle, target, network, path)
        if target == PACKAGES:
            _check_package(bundle, network, path)
    for path, engine in zip(paths.values(), make_engines(target, list(paths.values())), strict=True):
        _check_weights(bundle, path, engine.weights)


def _check_graph(bundle: Bundle, network: str, path: Path) -> None:
    labels = {entry.key: entry.value for entry in read_graph(path).metadata_props}
    expected = labels_for(network, bundle.manifest.model, bundle.manifest.plan)
    if (name := labels.get(NETWORK)) != network:
        raise BundleError(f"{path} is of {name!r}, and the manifest has it as {network!r}; build the bundle again")
    if not expected.items() <= labels.items():
        raise BundleError(f"{path} was made for another model or segment than the manifest's; build the bundle again")


def _check_plan(bundle: Bundle, target: str, network: str, path: Path) -> None:
    graph = bundle.engine_paths(GRAPHS).get(network)
    if graph is None or GRAPH_HASHES[target](path) != bundle.manifest.files[_name(bundle, graph)].sha256:
        raise BundleError(f"{path} was not built from the bundle's graph of {network!r}; {_cure(bundle, target)}")


def _check_package(bundle: Bundle, network: str, path: Path) -> None:
    """Check that a package is where its engine finds the weights by the network's graph."""
    graph = bundle.engine_paths(GRAPHS)[network]
    if graph_of(path) != graph:
        raise BundleError(f"{path} is not where the package of {network!r} belongs; {_cure(bundle, PACKAGES)}")
    _check_graph(bundle, network, graph)


def _check_weights(bundle: Bundle, path: Path, spans: Sequence[WeightSpan]) -> None:
    for span in spans:
        name, end = _name(bundle, span.path), span.offset + span.length
        if name not in bundle.manifest.files:
            raise BundleError(f"{path} has weights in {name}, which the manifest does not name; build the bundle again")
        if end > (size := bundle.manifest.files[name].bytes):
            raise BundleError(
                f"{path} has weights up to byte {end} of {name}, which has {size}; build the bundle again"
            )


def _cure(bundle: Bundle, target: str) -> str:
    return f"compile it again: dyexport compile {bundle.root} --target {target}"


def _name(bundle: Bundle, path: Path) -> str:
    return path.relative_to(bundle.base).as_posix()
