"""Plans as text: what scripts/plan.py prints."""

from collections.abc import Iterator, Sequence

import jax

from dsv3_jax.config import ConfigError, TrainConfig
from dsv3_jax.parallel.mesh import mesh_sizes
from dsv3_jax.parallel.rules import parameter_table
from dsv3_jax.planning.chips import GB, GIB, Topology, parse_topology
from dsv3_jax.planning.memory import abstract_mesh, abstract_state
from dsv3_jax.planning.plan import Plan, make_plan
from dsv3_jax.planning.roofline import link_seconds
from dsv3_jax.planning.search import search as search_plans
from dsv3_jax.planning.traffic import executed_flops, microbatches, model_flops, step_tokens

_SHOWN = 15  # plans of a search


def _size(count: float) -> str:
    """Bytes in words: 12.34 GB."""
    for unit, name in ((10**12, "TB"), (GB, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count:,.0f} B"


def _mesh(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1 device"


def _memory_lines(plan: Plan) -> Iterator[str]:
    memory, hbm = plan.memory, plan.topology.chip.hbm
    yield "memory of one device, from shapes:"
    for name in ("parameters", "optimizer", "gradients", "copies", "kept", "working"):
        yield f"  {name:<24}{_size(getattr(memory, name)):>12}"
    yield f"  {'together':<24}{_size(memory.total):>12}  {memory.total / hbm:.0%} of {_size(hbm)}"
    compiled = plan.compiled
    if compiled is None:
        return
    yield f"memory of one device, compiled in {compiled.seconds:.0f} s:"
    if not compiled.fits:
        yield f"  needs {_size(compiled.needed)} of {_size(compiled.limit or 0)}"
        return
    rows = {
        "arguments": compiled.arguments,
        "results not in place": compiled.outputs - compiled.aliased,
        "temporaries": compiled.temporaries,
        "code": compiled.code,
    }
    for name, count in rows.items():
        yield f"  {name:<24}{_size(count):>12}"
    yield (
        f"  {'together':<24}{_size(compiled.needed):>12}  {compiled.needed / hbm:.0%} of "
        f"{_size(hbm)} ({hbm / GIB:.0f} GiB)"
    )
    yield f"  Pallas kernels in it: {compiled.kernels}"


def _collective_lines(plan: Plan) -> Iterator[str]:
    source = "from shapes"
    if plan.compiled is not None and plan.compiled.fits:
        source = "from the compiled program"
    yield f"sent by one device in a step, {source}:"
    for c in plan.collectives:
        seconds = link_seconds(c, plan.sizes, plan.topology)
        axes = "+".join(c.axes)
        yield f"  {c.kind:<20}{axes:<20}{_size(c.sent):>12}{c.calls:>9} calls{seconds:>9.3f} s"


def _bound_lines(plan: Plan) -> Iterator[str]:
    bound, chip = plan.bound, plan.topology.chip
    yield (
        f"bounds of a step at {chip.peak / 1e12:.1f} TFLOP/s (bfloat16) and "
        f"{chip.hbm_bandwidth / GB:,.0f} GB/s a device:"
    )
    flops = model_flops(plan.config)
    yield (
        f"  arithmetic {bound.arithmetic:.2f} s ({flops:.3e} FLOP, "
        f"x {executed_flops(plan.config) / flops:.2f} with what is recomputed), "
        f"memory {bound.memory:.2f} s, "
        f"links {sum(bound.links.values()):.2f} s"
    )
    for name, seconds in (("all hidden", bound.hidden), ("none hidden", bound.exposed)):
        yield (
            f"  communication {name + ':':<13} {seconds:8.2f} s a step, "
            f"{bound.tokens_per_chip(seconds):,.0f} tokens/s a chip, "
            f"MFU at most {bound.mfu(seconds):.1%}"
        )


def describe(plan: Plan) -> str:
    """The plan as text, a few lines."""
    config, topology = plan.config, plan.topology
    lines = [
        f"{topology.name}: {topology.chips:,} chips, {topology.devices:,} devices, "
        f"mesh {_mesh(plan.sizes)}",
        f"step: {microbatches(config)} microbatches of {config.batch.microbatch_size:,} sequences "
        f"of {config.data.sequence_length:,}, {step_tokens(config):,} tokens; "
        f"remat {config.runtime.remat_policy!r}",
        *_memory_lines(plan),
        *_collective_lines(plan),
        *_bound_lines(plan),
        "fits" if plan.fits else "DOES NOT FIT",
    ]
    return "\n".join(lines)


def describe_many(plans: Sequence[Plan]) -> str:
    """A table with a line a plan."""
    head = (
        f"{'mesh':<34}{'remat':<11}{'microbatch':>10}{'memory':>11}{'hidden':>10}{'exposed':>10}"
        f"{'tokens/s a chip':>17}"
    )
    lines = [head]
    for plan in plans:
        bound = plan.bound
        lines.append(
            f"{_mesh(plan.sizes):<34}{plan.config.runtime.remat_policy:<11}"
            f"{plan.config.batch.microbatch_size:>10,}{_size(plan.memory.total):>11}"
            f"{bound.hidden:>8.2f} s{bound.exposed:>8.2f} s"
            f"{bound.tokens_per_chip(bound.exposed):>17,.0f}"
        )
    return "\n".join(lines)


def describe_scaling(config: TrainConfig, topologies: Sequence[Topology]) -> tuple[str, bool]:
    """The best plan of a search on each cluster, a line each, and whether there is one on all."""
    lines = [
        f"{'cluster':<16}{'chips':>6}  {'mesh':<32}{'remat':<11}{'memory':>10}{'sent':>11}"
        f"{'a step':>19}{'tokens/s a chip':>17}{'MFU':>15}"
    ]
    fits = True
    for topology in topologies:
        plans = search_plans(config, topology)
        head = f"{topology.name:<16}{topology.chips:>6,}  "
        if not plans:
            lines.append(f"{head}nothing fits")
            fits = False
            continue
        plan, bound = plans[0], plans[0].bound
        times = (bound.hidden, bound.exposed)
        sent = sum(c.sent for c in plan.collectives)
        lines.append(
            f"{head}{_mesh(plan.sizes):<32}{plan.config.runtime.remat_policy:<11}"
            f"{_size(plan.memory.total):>10}{_size(sent):>11}"
            f"{' to '.join(f'{t:.1f}' for t in times) + ' s':>19}"
            f"{' to '.join(f'{bound.tokens_per_chip(t):,.0f}' for t in times):>17}"
            f"{' to '.join(f'{bound.mfu(t):.1%}' for t in times):>15}"
        )
    return "\n".join(lines), fits


def describe_parameters(config: TrainConfig, devices: int) -> str:
    """Every parameter and expert bias: its shape, the axes that share it out, its part."""
    sizes = mesh_sizes(config.parallel, devices)
    state = abstract_state(config, abstract_mesh(sizes))
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.router_state))
    shapes = {
        tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)): leaf.shape
        for path, leaf in leaves
    }
    return parameter_table(sizes, shapes)


def report(
    config: TrainConfig,
    topology_name: str | None,
    *,
    memory_only: bool,
    search: bool,
    compiled: int,
    table: bool,
) -> tuple[str, bool]:
    """What `scripts/plan.py` prints, and whether the plan (of a search, any plan) fits.

    Args:
      config: the run.
      topology_name: such as "v5p:8x8x16"; for a search several, separated by commas.
      memory_only: compile nothing.
      search: rank meshes instead of planning the run's own.
      compiled: of a search, how many of the best to compile.
      table: list the parameters instead.

    Raises:
      ConfigError: bad input, in one line.
    """
    if topology_name is None:
        raise ConfigError("no cluster given (--topology, such as v5p:8x8x16 or h100:128)")
    names = topology_name.split(",")
    if len(names) > 1:
        if not search:
            raise ConfigError("several clusters (--topology A,B,...) are compared with --search")
        return describe_scaling(config, [parse_topology(name) for name in names])
    topology = parse_topology(topology_name)
    if table:
        return describe_parameters(config, topology.devices), True
    if not search:
        plan = make_plan(config, topology, compile=topology.chip.is_tpu and not memory_only)
        return describe(plan), plan.fits
    plans = search_plans(config, topology)
    texts = [f"{topology.name}: {len(plans)} plans fit, from shapes", describe_many(plans[:_SHOWN])]
    best = [make_plan(plan.config, topology, compile=True) for plan in plans[:compiled]]
    texts += [describe(plan) for plan in best]
    return "\n\n".join(texts), any(plan.fits for plan in best or plans)
