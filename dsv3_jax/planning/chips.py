"""Accelerators and clusters of them: published peaks, and topologies such as "v5p:8x8x16".

TPU figures: Google Cloud's TPU pages (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x, read
2026-11). Their inter-chip bandwidth counts both directions of all links: half of it is what a chip
can send. GPU figures: NVIDIA's data sheets of the SXM boards; NVLink 900 GB/s counts both
directions, and a node of 8 is taken to have a 400 Gbit/s adapter a GPU.
"""

import dataclasses
import math

from dsv3_jax.config import ConfigError, nearest_name
from dsv3_jax.training.flops import peak_flops

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as JAX sees it: a chip, or a half of one where a chip is two devices.

    kind: JAX's `device_kind`. hbm: bytes of memory. hbm_bandwidth: bytes/s. link: bytes/s that
    one link sends. links: of one device; 0 for a GPU, which reaches its node at `link` and other
    nodes at `network` bytes/s. devices: JAX devices of a chip, or GPUs of a node. dimensions: of
    the torus. alignment: chips along a dimension come in multiples of it, in larger slices.
    """

    name: str
    kind: str
    hbm: int
    hbm_bandwidth: float
    link: float
    links: int
    devices: int
    dimensions: int
    network: float

    @property
    def is_tpu(self) -> bool:
        return self.links > 0

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s of one device."""
        peak = peak_flops(self.kind)
        assert peak is not None  # every row below is in that table
        return peak


_CHIPS = (
    # name, device kind, HBM, HBM B/s, B/s a link sends, links, devices, dimensions, network B/s
    Chip("v5e", "TPU v5 lite", 16 * GIB, 819 * GB, 50 * GB, 4, 1, 2, 3.1 * GB),
    Chip("v5p", "TPU v5p", 95 * GIB, 2765 * GB, 100 * GB, 6, 1, 3, 6.25 * GB),
    Chip("v6e", "TPU v6 lite", 32 * GIB, 1638 * GB, 100 * GB, 4, 1, 2, 12.5 * GB),
    # A chip is two devices: each has half of its memory, bandwidth and links.
    Chip("tpu7x", "TPU7x", 96 * GIB, 3690 * GB, 100 * GB, 3, 2, 3, 6.25 * GB),
    Chip("h100", "NVIDIA H100 80GB HBM3", 80 * GB, 3350 * GB, 450 * GB, 0, 8, 1, 50 * GB),
    Chip("h200", "NVIDIA H200", 141 * GB, 4800 * GB, 450 * GB, 0, 8, 1, 50 * GB),
)
CHIPS = {chip.name: chip for chip in _CHIPS}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips, along each dimension of a TPU's torus; for GPUs (nodes, GPUs of a node)."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * (self.chip.devices if self.chip.is_tpu else 1)


def parse_topology(text: str) -> Topology:
    """Reads "v5p:8x8x16", "v6e:16x16", "h100:128" (GPUs) or "h200:8x16" (GPUs x nodes).

    Raises:
      ConfigError: an unknown chip (with the nearest name), or a shape that it does not come in.
    """
    name, _, shape_text = text.partition(":")
    if name not in CHIPS:
        hint = nearest_name(name, CHIPS)
        raise ConfigError(f"--topology {text!r}: chip must be one of {', '.join(CHIPS)}{hint}")
    chip = CHIPS[name]
    wanted = "x".join("248"[: chip.dimensions]) if chip.is_tpu else "8x16"
    try:
        shape = tuple(int(part) for part in shape_text.split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ConfigError(f"--topology {text!r} must be a chip and sizes, as in {name}:{wanted}")
    if not chip.is_tpu:
        return Topology(chip, _nodes(text, shape, chip.devices))
    if len(shape) != chip.dimensions:
        raise ConfigError(
            f"--topology {text!r} must have {chip.dimensions} sizes, as in {name}:{wanted}"
        )
    return Topology(chip, shape)


def _nodes(text: str, shape: tuple[int, ...], node: int) -> tuple[int, ...]:
    """(GPUs of a node, nodes)."""
    gpus = math.prod(shape)
    if len(shape) > 2 or (len(shape) == 2 and shape[0] != node):
        raise ConfigError(f"--topology {text!r} must be GPUs or {node}xNODES")
    if gpus > node and gpus % node:
        raise ConfigError(f"--topology {text!r}: {gpus} GPUs must fill nodes of {node}")
    return (min(gpus, node), max(1, gpus // node))
