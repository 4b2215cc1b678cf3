"""How the processes of one run find each other."""

import dataclasses
import re

from dsv3_jax.config.checks import require


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """The processes of a run, one a host or one a GPU; nothing here changes what they compute.

    `address`: "host:port" of process 0, which listens there and on the next port. `count`: the
    number of processes. `index`: this process, from 0. All three null: they come from
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, else from SLURM or the TPU pod
    (Google Cloud, GKE) this process runs in, else it is the only one.
    `join_timeout_s`: how long the processes wait for the last one to come.
    `silence_timeout_s`: a host that has not answered for so long is taken for lost. (A process
    that ends is noticed at once.)
    """

    address: str | None = None
    count: int | None = None
    index: int | None = None
    join_timeout_s: int = 300
    silence_timeout_s: int = 60

    def __post_init__(self) -> None:
        place = "ClusterConfig"
        given = {name: getattr(self, name) for name in ("address", "count", "index")}
        missing = [name for name, value in given.items() if value is None]
        require(
            len(missing) in (0, 3),
            f"{' and '.join(missing)} must be given too where one of address, count and index is",
            place,
        )
        for name in ("join_timeout_s", "silence_timeout_s"):
            value = getattr(self, name)
            require(value > 0, f"{name}={value} must be positive", place)
        if self.address is None or self.count is None or self.index is None:
            return
        found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s]+):([0-9]{1,5})", self.address)
        require(
            found is not None and 0 < int(found[2]) < 65535,
            f"address={self.address!r} must be host:port with a port in 1..65534",
            place,
        )
        require(self.count > 0, f"count={self.count} must be positive", place)
        require(
            0 <= self.index < self.count, f"index={self.index} must be in [0, {self.count=})", place
        )
