"""The least time a step can take on a cluster: arithmetic, memory traffic, links.

Every figure is a bound at published peaks, not a prediction. Arithmetic and memory overlap
perfectly here; communication is given twice, fully hidden behind them and not hidden at all.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dsv3_jax.config import TrainConfig
from dsv3_jax.planning.chips import Topology
from dsv3_jax.planning.hlo import Collective
from dsv3_jax.planning.memory import Memory, Sizes, step_intermediates
from dsv3_jax.planning.traffic import (
    executed_flops,
    layer_weights,
    microbatches,
    model_flops,
    step_tokens,
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one device in a step, and what follows from them.

    arithmetic: executed FLOPs at peak. memory: what goes through HBM. links: collectives one after
    the other, by mesh axes. tokens: of the step, on all devices.
    """

    arithmetic: float
    memory: float
    links: Mapping[tuple[str, ...], float]
    flops: int
    tokens: int
    peak: float  # of all devices
    chips: int

    @property
    def hidden(self) -> float:
        """Seconds a step when the links work behind arithmetic and memory."""
        return max(self.arithmetic, self.memory, sum(self.links.values()))

    @property
    def exposed(self) -> float:
        """Seconds a step when nothing is computed while the links work."""
        return max(self.arithmetic, self.memory) + sum(self.links.values())

    def mfu(self, seconds: float) -> float:
        """Useful FLOPs over what the devices could do in this time."""
        return self.flops / (seconds * self.peak)

    def tokens_per_chip(self, seconds: float) -> float:
        """Tokens/s a chip (GPU)."""
        return self.tokens / seconds / self.chips


def _axis_group(axes: Sequence[str], sizes: Sizes) -> tuple[int, int]:
    """(devices of a group, distance in device numbers that it spans)."""
    names = list(sizes)
    group = math.prod(sizes[axis] for axis in axes)
    last = max(names.index(axis) for axis in axes)
    inner = math.prod(sizes[axis] for axis in names[last + 1 :])
    first = min(names.index(axis) for axis in axes)
    return group, inner * math.prod(sizes[axis] for axis in names[first : last + 1])


def link_seconds(collective: Collective, sizes: Sizes, topology: Topology) -> float:
    """Of one device's part of these collectives on idle links.

    On a TPU torus rings use every link of a device; an all-to-all is bound by the middle of the
    block of devices that it spans, taken to be as cubic as can be and without wrap-around links:
    half of what the block sends crosses one face of it. On GPUs what stays in the node goes by
    NVLink, the rest by the device's network adapter. Other slices (the replica axis of TPUs that
    is not part of the torus) are not modelled: a topology is one slice.
    """
    chip = topology.chip
    group, span = _axis_group(collective.axes, sizes)
    if not chip.is_tpu:
        node = chip.devices
        near = min(group, max(1, group * node // max(span, 1)))
        beyond = 1 - (near - 1) / (group - 1) if group > 1 else 0.0
        far = collective.sent * beyond / chip.network
        return max(far, collective.sent * (1 - beyond) / chip.link)
    if collective.kind.endswith("all-to-all"):
        side = group ** (1 / chip.dimensions)
        # group/2 devices send half of their bytes across group/side links.
        return collective.sent * side / 4 / chip.link
    return collective.sent / (chip.link * chip.links)


def _memory_traffic(config: TrainConfig, sizes: Sizes, memory: Memory) -> float:
    """Bytes through HBM in a step, from shapes.

    The update reads and writes parameters and moments and reads gradients. A microbatch writes and
    reads gathered weights twice and adds their gradients; each intermediate of a layer is written
    and read once forward, once more where it is computed again, and twice for its gradients.
    """
    times = microbatches(config)
    itemsize = np.dtype(config.runtime.compute_dtype).itemsize
    update = 2 * memory.parameters + 2 * memory.optimizer + memory.parameters
    forward = 1 if config.runtime.remat_policy == "none" else 2
    each = 5 * sum(layer_weights(config, sizes, itemsize)) + 3 * memory.parameters
    each += 2 * (forward + 2) * step_intermediates(config, sizes)
    return update + times * each


def roofline(
    config: TrainConfig,
    sizes: Sizes,
    topology: Topology,
    memory: Memory,
    collectives: Sequence[Collective],
) -> Roofline:
    """Bounds for the largest step of a run."""
    chip, devices = topology.chip, topology.devices
    links: dict[tuple[str, ...], float] = {}
    for collective in collectives:
        seconds = link_seconds(collective, sizes, topology)
        links[collective.axes] = links.get(collective.axes, 0.0) + seconds
    return Roofline(
        arithmetic=executed_flops(config) / devices / chip.peak,
        memory=_memory_traffic(config, sizes, memory) / chip.hbm_bandwidth,
        links=links,
        flops=model_flops(config),
        tokens=step_tokens(config),
        peak=chip.peak * devices,
        chips=topology.chips,
    )
