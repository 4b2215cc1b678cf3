"""The number format and the tile length of everything FP8 here."""

import jax.numpy as jnp

TILE = 128
E4M3 = jnp.float8_e4m3fn
MAX_CODE = 448.0  # the largest e4m3 number
# Compiled code takes smaller float32 numbers for zero, and zero may not divide.
SMALLEST_SCALE = float(jnp.finfo(jnp.float32).tiny)
