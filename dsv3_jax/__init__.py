"""DeepSeek-V3 in JAX and Flax Linen: the network, its training, and its weights in and out.

Shape legend. Local arrays carry their axes as a suffix (`scores_ME`); parameters never do.

    B batch          T query position   S key position     N heads       D hidden
    A query rank     C key/value rank   P head, no RoPE    R head, RoPE  H value head
    M tokens (B·T)   E routed experts   G expert groups    K choices     F expert FFN
    L layers         V vocabulary
"""

from typing import Any

__all__ = ["ModelConfig", "load_pretrained", "to_hf_state_dict"]

_HOME = {
    "ModelConfig": "dsv3_jax.config",
    "load_pretrained": "dsv3_jax.checkpoints.convert",
    "to_hf_state_dict": "dsv3_jax.checkpoints.convert",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `import dsv3_jax` stays instant."""
    if name not in _HOME:
        raise AttributeError(f"module 'dsv3_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
