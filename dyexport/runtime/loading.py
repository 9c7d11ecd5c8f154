"""``dyexport.load``: open a bundle as an object that stands in for ``transformer`` in diffusers' pipelines."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from dyexport.arguments import check_budget, check_device, check_memory, shown, whole_number
from dyexport.backbones import BACKBONES, get_stand_in
from dyexport.bundle.manifest import CONDITIONING, DENSE, DENSE_CONDITIONING
from dyexport.bundle.plan import segment_name
from dyexport.bundle.reader import Bundle, root_at
from dyexport.bundle.token_paths import check_token_path
from dyexport.engines.held import HeldEngine
from dyexport.engines.networks import check_networks
from dyexport.engines.registry import EngineOptions, engine_files, get_backend, make_engines
from dyexport.engines.switching import SwitchingEngine
from dyexport.errors import BundleError, DyexportWarning, UsageError
from dyexport.runtime.conditioning import Conditioner
from dyexport.runtime.locating import find_bundle
from dyexport.runtime.memory import Placement, WeightBytes, place
from dyexport.runtime.residency import distinct_bytes
from dyexport.runtime.routing import RouteCache, Router, dense_route, route
from dyexport.runtime.transformer import BundleTransformer, Running


def load(
    bundle_path: str | Path,
    *,
    target: str = "onnx",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    max_resident: int | None = None,
    memory: int | str | None = None,
    share_weights: bool = False,
    cuda_graphs: bool = False,
    check_hashes: bool = True,
    dense: bool = False,
    fallback: bool = True,
    budget: float | None = None,
) -> BundleTransformer:
    """Open a bundle as the transformer of a diffusers pipeline. No weights are read before the first call.

    bundle_path    a directory, or a repository of the Hugging Face hub
    target         a target that the bundle was built for, or ``onnx-rtx``: its ONNX graphs on TensorRT-RTX
    device         ``cpu``, ``cuda`` or ``cuda:N``; by default CUDA where torch and the backend have it
    dtype          dtype in which the pipeline makes latents; the engines' precision is the bundle's
    max_resident   most engines in memory at a time (default: all); below that, the conditioning engine is parked
                   after each run
    memory         instead of ``max_resident``: most bytes of weights, or a text such as ``"8GiB"``; decides how many
                   engines stay, and whether weights are streamed; activations come on top
    share_weights  let engines map one copy of the weights
    cuda_graphs    let ONNX Runtime capture its runs on CUDA where it can; TensorRT does so without being asked
    check_hashes   check the hash of every file
    dense          open the static model that a bundle keeps for comparison
    fallback       where the target does not run on this machine, warn and run the ONNX graphs; else raise
    budget         one of a bundle of several; ``transformer.budget = 0.3`` changes it later

    Raises ``BundleError`` for a damaged bundle, ``EngineMismatchError`` for a target that it was not built for or that
    does not run here, ``UsageError`` for an argument out of range, ``MissingDependencyError`` for an absent backend.
    """
    limit, most_bytes = _bounds(max_resident, memory)
    root = find_bundle(bundle_path)
    if budget is not None:
        root = root_at(root, check_budget(budget))
    bundle, opened = _open(root, target, check_hashes=check_hashes, dense=dense, fallback=fallback)
    chosen = _device(opened, device)
    options = EngineOptions(device=chosen, share_weights=share_weights, cuda_graphs=cuda_graphs)
    placement = _place(opened, options, limit, most_bytes)
    options = replace(options, streaming_budget=placement.streaming_budget)
    reopen = partial(
        load,
        target=target,
        device=device,
        max_resident=max_resident,
        memory=memory,
        share_weights=share_weights,
        cuda_graphs=cuda_graphs,
        check_hashes=check_hashes,
        dense=dense,
        fallback=fallback,
    )
    if (backbone := bundle.manifest.model.backbone) not in BACKBONES:
        raise BundleError(f"this dyexport runs {', '.join(BACKBONES)}, not {backbone!r}; upgrade dyexport")
    stand_in = get_stand_in(backbone)
    stand_in.check_spec(bundle.manifest.model)
    return stand_in(
        bundle,
        partial(_start, bundle, opened, options, placement, dense),
        reopen,
        target=opened.target,
        device=torch.device(options.device),
        dtype=_checked_dtype(dtype),
        keep_budgets=limit is None and most_bytes is None,
    )


def _start(bundle: Bundle, opened: _Opened, options: EngineOptions, placement: Placement, dense: bool) -> Running:
    *engines, conditioning = (
        HeldEngine(engine, bundle) for engine in make_engines(opened.target, opened.paths, options)
    )
    find = dense_route if dense else partial(route, bundle.manifest.plan, bundle.widths, bundle.token_stats)
    routes = RouteCache(find, options.device)
    conditioner = Conditioner(conditioning, resident=placement.max_resident is None, device=options.device)
    router = Router(routes, conditioner, engines[0])
    noise, data = bundle.manifest.model.noise_to_data
    engine = SwitchingEngine(
        engines,
        router,
        ahead=1 if noise < data else -1,
        max_resident=placement.max_resident,
        make_io=router.io,
    )
    return Running(engine, conditioner, routes)


def _checked_dtype(dtype: torch.dtype) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype is {shown(dtype)}; give a floating-point dtype of torch, such as torch.bfloat16")
    return dtype


class _Opened(NamedTuple):
    """The target that runs and its files: engines in the order of t, then their conditioning network."""

    target: str
    paths: list[Path]


def _open(path: str | Path, target: str, *, check_hashes: bool, dense: bool, fallback: bool) -> tuple[Bundle, _Opened]:
    """Open the bundle, and find the engines that run on this machine."""
    files = engine_files(target)
    # A graph is data. The engines of every other target are code, which runs only if its hash is right.
    bundle = Bundle.open(path, check_hashes=check_hashes or files != "onnx")
    opened = _Opened(target, _engine_paths(bundle, files, dense))
    if not dense:
        check_token_path(bundle, target)
    check_networks(bundle, files)
    if not fallback or (reason := _incompatibility(opened)) is None:
        return bundle, opened
    while _incompatibility(opened) is not None:
        opened = _Opened(get_backend(opened.target).fallback, _engine_paths(bundle, "onnx", dense))
        check_networks(bundle, "onnx")
    decision = f"{bundle.root}: {reason}; running its ONNX graphs as target {opened.target!r}"
    warnings.warn(decision, DyexportWarning, stacklevel=3)
    return bundle, opened


def _incompatibility(opened: _Opened) -> str | None:
    return get_backend(opened.target).incompatibility(opened.paths[0])


def _bounds(max_resident: int | None, memory: int | str | None) -> tuple[int | None, int | None]:
    """Check both bounds. Raises ``UsageError``."""
    if max_resident is not None and memory is not None:
        raise UsageError(f"max_resident is {max_resident} and memory {memory!r}; give one of the two")
    if max_resident is not None:
        max_resident = whole_number("max_resident", max_resident, least=1, most=sys.maxsize, cure="give 1 or more")
    return max_resident, None if memory is None else check_memory(memory)


def _place(opened: _Opened, options: EngineOptions, max_resident: int | None, memory: int | None) -> Placement:
    if memory is None:
        return Placement(max_resident=max_resident)
    return place(_weight_bytes(opened, options), memory)


def _weight_bytes(opened: _Opened, options: EngineOptions) -> WeightBytes:
    made = make_engines(opened.target, opened.paths, options)
    *engines, conditioning = (distinct_bytes(engine.weights) for engine in made)
    shared = distinct_bytes(span for engine in made for span in engine.weights)
    return WeightBytes(
        engines=tuple(engines),
        conditioning=conditioning,
        together=shared if all(engine.shares_weights for engine in made) else sum(engines) + conditioning,
        streamable=all(map(get_backend(opened.target).streams, opened.paths)),
    )


def _engine_paths(bundle: Bundle, target: str, dense: bool) -> list[Path]:
    """List the engines in the order of t, then their conditioning network. Raises ``BundleError``."""
    paths = bundle.engine_paths(target)
    own = DENSE_CONDITIONING if dense and DENSE_CONDITIONING in paths else CONDITIONING
    networks = [DENSE] if dense else [segment_name(index) for index in range(len(bundle.manifest.plan.segments))]
    missing = [name for name in (*networks, own) if name not in paths]
    if missing:
        cure = (
            "build the bundle again" if target == "onnx" else f"run: dyexport compile {bundle.root} --target {target}"
        )
        raise BundleError(f"{bundle.root} has no {target!r} engine {missing[0]!r}; {cure}")
    return [paths[name] for name in (*networks, own)]


def _device(opened: _Opened, device: str | torch.device | None) -> str:
    target, backend = opened.target, get_backend(opened.target)
    built_for = backend.device_of(opened.paths[0])
    if device is None:
        return built_for or ("cuda" if torch.cuda.is_available() and backend.has_cuda() else "cpu")
    name = check_device(device)
    if built_for not in (None, kind := name.partition(":")[0]):
        raise UsageError(
            f"device is {name!r} and the {target!r} engines were compiled for {built_for}; use {built_for}, "
            f"or compile them for {kind}: dyexport compile BUNDLE --target {target}"
        )
    check_present(name)
    if name != "cpu" and not backend.has_cuda():
        raise UsageError(f"device is {name!r} and this machine's {target!r} runs on the CPU alone; use cpu")
    return name


def check_present(device: str) -> None:
    """Raise ``UsageError`` for a CUDA device that torch does not see."""
    index = int(device.partition(":")[2] or 0)
    if device != "cpu" and (count := torch.cuda.device_count()) <= index:
        raise UsageError(
            f"device is {device!r} and torch sees {count} CUDA devices; use cpu, or install torch for CUDA"
        )
