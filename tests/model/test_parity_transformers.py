"""Logits and gradients against transformers' DeepSeek-V3 and the independent reference.

Tolerances are relative L2 distances in float32: 2e-5 for logits and 1e-4 for gradients. Two right
float32 implementations of these models differ by about 3e-6 and 1e-5, the sum of rounding over
their layers; every mistake in `reference.MISTAKES` moves the logits by far more.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dsv3_jax import load_pretrained, to_hf_state_dict
from tests.oracles import hf, reference

VARIANTS = list(hf.VARIANTS)
WITH_MTP = [name for name in VARIANTS if hf.config_of(name)["num_nextn_predict_layers"]]
LOGITS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
MTP_WEIGHT = 0.3


def test_transformers_writes_the_names_the_checkpoints_use(checkpoint, tmp_path):
    case = checkpoint("base")
    case.transformers.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "np") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    main = {**case.config, "num_nextn_predict_layers": 0}
    assert written == hf.tensor_shapes(main)


@pytest.mark.parametrize("variant", VARIANTS)
def test_oracles_agree_with_each_other(checkpoint, relative_l2, variant):
    case = checkpoint(variant)
    with torch.no_grad():
        theirs = case.transformers(torch.tensor(case.token_ids, dtype=torch.long)).logits
    assert relative_l2(theirs, case.reference.logits) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gate_decision_is_near_a_tie(checkpoint, variant):
    """Otherwise rounding could re-route a token and the tolerances would mean nothing."""
    routing = checkpoint(variant).reference.routing
    assert all(float(layer.margin.min()) > 9e-4 for layer in routing.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(checkpoint, relative_l2, variant):
    case = checkpoint(variant)
    with torch.no_grad():
        want = case.transformers(torch.tensor(case.token_ids, dtype=torch.long)).logits
    assert case.output.logits.dtype == jnp.float32
    assert relative_l2(case.output.logits, want) <= LOGITS_TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_the_reference(checkpoint, relative_l2, variant):
    case = checkpoint(variant)
    assert relative_l2(case.output.logits, case.reference.logits) <= LOGITS_TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_comes_back_bit_for_bit(checkpoint, variant):
    case = checkpoint(variant)
    back = to_hf_state_dict(case.model.config, case.variables)
    assert set(back) == set(case.weights)
    for name, array in case.weights.items():
        np.testing.assert_array_equal(np.asarray(back[name]), array, err_msg=name)


def test_sharded_folder_loads_the_same_variables(checkpoint, tmp_path):
    case = checkpoint("base")
    folder = hf.save(tmp_path, case.config, case.weights, shards=3)
    _, variables = load_pretrained(folder, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, variables, case.variables)


def _cross_entropy(logits, ids, ahead):
    """Mean cross-entropy of row i against token i + ahead."""
    log_probs = jax.nn.log_softmax(logits[:, : ids.shape[1] - ahead], axis=-1)
    return -jnp.take_along_axis(log_probs, ids[:, ahead:, None], axis=-1).mean()


@pytest.fixture(scope="module")
def gradients():
    """`gradients(case, mtp_weight)`: {released name: gradient} of main + weight * MTP loss."""
    compiled = {}

    def compute(case, mtp_weight):
        def loss(params, router_state, ids, weight):
            variables = {"params": params, "router_state": router_state}
            out = case.model.apply(variables, ids, mtp=case.depth > 0)
            total = _cross_entropy(out.logits, ids, 1)
            for k in range(case.depth):
                total += weight / case.depth * _cross_entropy(out.mtp_logits[k], ids, k + 2)
            return total

        if case.variant not in compiled:
            compiled[case.variant] = jax.jit(jax.grad(loss))
        state = case.variables["router_state"]
        grads = compiled[case.variant](
            case.variables["params"], state, case.token_ids, jnp.float32(mtp_weight)
        )
        return to_hf_state_dict(case.model.config, {"params": grads, "router_state": state})

    return compute


def _assert_gradients(got, want, relative_l2):
    """Every tensor of `want` within tolerance; a gradient of exactly zero must be one here too."""
    wrong = {
        name: distance
        for name, gradient in want.items()
        if not (distance := relative_l2(got[name], gradient)) <= GRADIENT_TOLERANCE
    }
    assert not wrong, f"{len(wrong)} of {len(want)} tensors: {dict(list(wrong.items())[:8])}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_match_transformers(checkpoint, gradients, relative_l2, variant):
    case = checkpoint(variant)
    model = case.transformers
    ids = torch.tensor(case.token_ids, dtype=torch.long)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    fused = {name: p.grad.numpy() for name, p in model.named_parameters()}
    want = hf.split_experts(fused)
    main = {**case.config, "num_nextn_predict_layers": 0}
    biases = {name for name in hf.tensor_shapes(main) if name.endswith("correction_bias")}
    assert set(want) | biases == set(hf.tensor_shapes(main))
    _assert_gradients(gradients(case, 0.0), want, relative_l2)


@pytest.mark.parametrize("variant", WITH_MTP)
def test_gradients_with_mtp_match_the_reference(checkpoint, gradients, relative_l2, variant):
    case = checkpoint(variant)
    weights = hf.as_torch(case.weights, requires_grad=True)
    ids = torch.tensor(case.token_ids, dtype=torch.long)
    out = reference.forward(case.config, weights, ids)
    loss = reference.cross_entropy(out.logits, ids, 1)
    for k in range(case.depth):
        term = reference.cross_entropy(out.mtp_logits[k], ids, k + 2)
        loss = loss + MTP_WEIGHT / case.depth * term
    loss.backward()
    # The MTP layers' copies of embedding and head are the main model's: no tensors of their own.
    shared = ("embed_tokens.weight", "shared_head.head.weight")
    want = {
        name: torch.zeros_like(w) if w.grad is None else w.grad
        for name, w in weights.items()
        if w.requires_grad and not (".layers." in name and name.endswith(shared))
    }
    assert sum(bool(g.any()) for g in want.values()) > 0.95 * len(want)
    _assert_gradients(gradients(case, MTP_WEIGHT), want, relative_l2)
