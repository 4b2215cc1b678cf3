"""Any part of a parameter, read from just those tensors of a Hugging Face folder that cross it."""

import concurrent.futures
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from dsv3_jax.checkpoints import hf_names
from dsv3_jax.checkpoints.array_store import turned
from dsv3_jax.checkpoints.fp8 import dequantize_blocks
from dsv3_jax.checkpoints.ledger import FP8, SCALE_SUFFIX, Assignment
from dsv3_jax.checkpoints.safetensors_io import TensorEntry, WeightsError
from dsv3_jax.checkpoints.tensor_bands import has_nonfinite


class PartReader:
    """Parts of parameters, for the devices that hold them.

    Args:
      assignments: of the tensors that fill the parameters, see `ledger.assign`.
      block: rows and columns of an FP8 weight that share a scale.
      allow_nonfinite: accept NaN and infinite weights.
    """

    def __init__(
        self,
        assignments: Iterable[Assignment],
        block: tuple[int, int] | None,
        allow_nonfinite: bool,
    ) -> None:
        self._block, self._allow_nonfinite = block, allow_nonfinite
        self._slots: dict[hf_names.Path, dict[tuple[int, ...], Assignment]] = {}
        for assignment in assignments:
            if assignment.row is not None:
                row = assignment.row
                slots = self._slots.setdefault(row.path, {})
                slots[tuple(i for i in row.index if not isinstance(i, slice))] = assignment

    def slots(self, path: hf_names.Path) -> list[Assignment]:
        """The tensors that fill a parameter."""
        return list(self._slots[path].values())

    def read(
        self, path: hf_names.Path, part: tuple[tuple[int, int], ...], dtype: np.dtype
    ) -> np.ndarray:
        """Elements `part` (start and end along each axis) of a parameter, as `dtype`.

        FP8 weights come times their scales, or as they are if `dtype` is FP8.

        Raises:
          WeightsError: a number in this part is not finite, unless allowed.
        """
        slots = self._slots[path]
        row = next(iter(slots.values())).row
        assert row is not None
        index = [*row.index, *[slice(None)] * (len(part) - len(row.index))]
        indexed = [axis for axis, i in enumerate(index) if not isinstance(i, slice)]
        kept = tuple(slice(*part[a]) for a, i in enumerate(index) if isinstance(i, slice))
        out = np.empty([stop - start for start, stop in part], dtype)

        def fill(key: tuple[int, ...]) -> None:
            at: list[Any] = [slice(None)] * len(part)
            for axis, number in zip(indexed, key, strict=True):
                at[axis] = number - part[axis][0]
            self._fill(slots[key], kept, out[tuple(at)])

        keys = list(itertools.product(*(range(*part[axis]) for axis in indexed)))
        if len(keys) == 1:
            fill(keys[0])
        else:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                list(pool.map(fill, keys))
        return out

    def _fill(self, assignment: Assignment, part: tuple[slice, ...], out: np.ndarray) -> None:
        """Reads `part`, in the parameter's axes, of the tensor of one slot."""
        entry, transpose = assignment.entry, assignment.row is not None and assignment.row.transpose
        if transpose:
            part = part[::-1]
        if entry.dtype == FP8 and out.dtype != FP8:
            self._dequantize(assignment, part, transpose, out)
            return
        # Rounded first: there is less to turn, and float64 cannot be turned by bits.
        raw = entry.read()[part].astype(out.dtype, copy=False)
        self._check(assignment.name, entry, raw)
        out[...] = turned(raw) if transpose else raw

    def _check(self, name: str, entry: TensorEntry, values: np.ndarray) -> None:
        if not self._allow_nonfinite and has_nonfinite(values):
            raise WeightsError(f"tensor {name!r} has NaN or infinite weights ({entry.file})")

    def _dequantize(
        self, assignment: Assignment, part: tuple[slice, ...], transpose: bool, out: np.ndarray
    ) -> None:
        assert assignment.scale is not None and self._block is not None
        blocks = [
            slice(p.start // size, -(-p.stop // size))
            for p, size in zip(part, self._block, strict=True)
        ]
        whole = tuple(
            slice(b.start * size, min(b.stop * size, n))
            for b, size, n in zip(blocks, self._block, assignment.entry.shape, strict=True)
        )
        codes, scales = assignment.entry.read()[whole], assignment.scale.read()[tuple(blocks)]
        self._check(assignment.name, assignment.entry, codes)
        self._check(assignment.name + SCALE_SUFFIX, assignment.scale, scales)
        if whole == part:
            dequantize_blocks(codes, scales, out.dtype, self._block, out, transpose=transpose)
            return
        values = dequantize_blocks(codes, scales, out.dtype, self._block, transpose=transpose)
        inner = [
            slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, whole, strict=True)
        ]
        out[...] = values[tuple(inner[::-1] if transpose else inner)]
