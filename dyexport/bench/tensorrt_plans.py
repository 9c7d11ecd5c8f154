"""Description of a TensorRT plan for ``dyexport inspect --engine``; needs neither a GPU nor TensorRT."""

from __future__ import annotations

from rich.table import Table

from dyexport.bundle.plan_info import INFO, PlanInfo
from dyexport.bundle.reader import Bundle
from dyexport.errors import UsageError


def plan_of(bundle: Bundle, target: str, network: str) -> PlanInfo:
    """Read the description of one network's plan. Raises ``EngineMismatchError`` or ``UsageError`` without one."""
    paths = bundle.engine_paths(target)
    if network not in paths or not paths[network].with_name(INFO).is_file():
        raise UsageError(f"{bundle.root} has no {target} plan of {network!r}; it has {', '.join(paths)} for {target}")
    return PlanInfo.read(paths[network].with_name(INFO))


def plan_lines(info: PlanInfo) -> tuple[Table, str]:
    """Return a table of what a plan was built for, and a list of its layers before fusion."""
    table = Table(show_header=False, box=None)
    table.add_row("flavour", f"{info.flavour} {info.version}, {info.precision}")
    table.add_row("compute capabilities", ", ".join(info.compute_capabilities) or "all that its builder knows")
    for index, profiles in enumerate(info.profiles):
        sizes = ", ".join(f"{name} {p.min}:{p.opt}:{p.max}" for name, p in profiles.items())
        table.add_row(f"profile {index}", sizes)
    for kind, specs in (("input", info.inputs), ("output", info.outputs)):
        for spec in specs:
            table.add_row(kind, f"{spec.name} {spec.dtype} {list(spec.shape)}")
    table.add_row("graph", info.graph_sha256)
    return table, "\n".join(("", f"{len(info.layers)} layers, before fusion:", *info.layers))
