"""From the sequences that each process reads to one batch on all devices."""

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.parallel.placement import batch_sharding


class BatchFeed:
    """Which sequences of every microbatch this process reads, and where they go.

    Processes whose devices hold the same sequences, such as those along the tensor or context
    axis, read the same ones.

    Attributes:
      part: int64 [n], positions in a microbatch, ascending.
    """

    def __init__(self, mesh: Mesh | None, microbatch: int) -> None:
        """For microbatches of `microbatch` sequences; without a mesh, one device takes all.

        Raises:
          ConfigError: the mesh cannot share them out equally.
        """
        self._microbatch = microbatch
        self._sharding = None if mesh is None else batch_sharding(mesh, microbatch)
        if self._sharding is None:
            self.part = np.arange(microbatch)
            return
        held = self._sharding.addressable_devices_indices_map((1, microbatch, 1)).values()
        positions = [np.arange(microbatch)[index[1]] for index in held if index is not None]
        self.part = np.unique(np.concatenate(positions))

    def place(self, rows: np.ndarray) -> jax.Array:
        """The global batch int32 [A, B, T + 1] of this process's rows [A * n, T + 1]."""
        tokens = rows.reshape(-1, len(self.part), rows.shape[1])
        if self._sharding is None:
            return jax.device_put(tokens)

        def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # every device of this process holds some
            wanted = np.arange(self._microbatch)[index[1]]
            return tokens[:, np.searchsorted(self.part, wanted)]

        shape = (len(tokens), self._microbatch, rows.shape[1])
        return jax.make_array_from_callback(shape, self._sharding, of_device)
