"""Laws the network obeys whatever its weights are; no reference needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import load_pretrained
from tests.oracles import hf

# Float32 sums in another order: about 3e-6 over four layers.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def decode():
    """`decode(case, stops)`: logits of `case.token_ids` fed through the cache in pieces.

    The pieces end at `stops`; a jitted function is kept for each variant, so pieces of one length
    compile once.
    """
    from dsv3_jax.model.cache import init_cache

    steps = {}

    def run(case, stops):
        if case.variant not in steps:
            steps[case.variant] = jax.jit(
                lambda variables, ids, cache: case.model.apply(variables, ids, cache=cache)
            )
        batch, length = case.token_ids.shape
        # Five rows of the cache stay empty: they must not be attended to.
        cache = init_cache(case.model.config, batch, length + 5, jnp.float32)
        rows = []
        for start, stop in zip([0, *stops], stops, strict=False):
            out = steps[case.variant](case.variables, case.token_ids[:, start:stop], cache)
            cache = out.cache
            rows.append(np.asarray(out.logits))
        return np.concatenate(rows, axis=1)

    return run


@pytest.mark.parametrize(
    ("variant", "stops"),
    [
        ("base", [37]),
        ("base", [18, 36, 37]),
        ("base", list(range(1, 38))),
        ("moonlight", list(range(1, 38))),
    ],
    ids=["prefill", "chunks and a token", "token by token", "moonlight, token by token"],
)
def test_absorbed_through_the_cache_equals_expanded(
    checkpoint, relative_l2, decode, variant, stops
):
    """All at once, in pieces, and one token a call from the first to past YaRN's length."""
    case = checkpoint(variant)
    assert relative_l2(decode(case, stops), case.output.logits) <= TOLERANCE


def test_causality(checkpoint):
    case = checkpoint("base")
    changed_at = 17
    changed = case.token_ids.copy()
    changed[:, changed_at] = (changed[:, changed_at] + 1) % case.config["vocab_size"]
    out = case.forward(case.variables, changed)
    difference = np.abs(np.asarray(out.logits - case.output.logits)).max(axis=(0, 2))
    # Routed rows move to other places of the expert matmuls, which may reorder a sum.
    assert difference[:changed_at].max() < 1e-4
    assert difference[changed_at:].min() > 1e-2


def test_sequences_of_a_batch_do_not_meet(checkpoint):
    case = checkpoint("base")
    changed = case.token_ids.copy()
    changed[1] = changed[1, ::-1]
    out = case.forward(case.variables, changed)
    difference = np.abs(np.asarray(out.logits - case.output.logits)).max(axis=(1, 2))
    assert difference[0] < 1e-4 and difference[1] > 1e-1
    swapped = case.forward(case.variables, case.token_ids[::-1])
    np.testing.assert_allclose(swapped.logits, case.output.logits[::-1], rtol=0, atol=1e-4)


def _permuted(weights, order):
    """The checkpoint with expert `order[e]` of every MoE layer moved to place e."""
    result = dict(weights)
    for name in weights:
        if ".mlp.gate." in name:
            result[name] = weights[name][order]
        elif ".mlp.experts." in name:
            stem, rest = name.split(".mlp.experts.")
            expert, part = rest.split(".", 1)
            result[name] = weights[f"{stem}.mlp.experts.{order[int(expert)]}.{part}"]
    return result


@pytest.mark.parametrize("law", ["experts within groups", "whole groups", "across groups"])
def test_permuting_experts(checkpoint, relative_l2, tmp_path, law):
    """Experts are interchangeable inside a group and groups as wholes, but not across groups."""
    case = checkpoint("base")
    rng = np.random.default_rng(5)
    groups = case.config["n_group"]
    order = np.arange(case.config["n_routed_experts"]).reshape(groups, -1)
    if law == "experts within groups":
        order = np.stack([rng.permutation(group) for group in order])
    elif law == "whole groups":
        order = order[np.roll(np.arange(groups), 1)]
    else:
        order = order.T
    order = order.reshape(-1)
    assert (order != np.arange(len(order))).any()
    folder = hf.save(tmp_path, case.config, _permuted(case.weights, order))
    _, variables = load_pretrained(folder, dtype="float32")
    out = case.forward(variables, case.token_ids)
    distance = relative_l2(out.logits, case.output.logits)
    if law == "across groups":
        assert distance > 1e-2
    else:
        assert distance <= TOLERANCE
        rows = case.token_ids.shape[1] - 1
        assert (
            relative_l2(out.mtp_logits[0][:, :rows], case.output.mtp_logits[0][:, :rows])
            <= TOLERANCE
        )
