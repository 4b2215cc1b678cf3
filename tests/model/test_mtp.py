"""Multi-token prediction: against the reference, against transformers, and its own rules."""

import jax
import numpy as np
import pytest
import torch

from tests.oracles import hf

WITH_MTP = [name for name in hf.VARIANTS if hf.config_of(name)["num_nextn_predict_layers"] > 0]
TOLERANCE = 2e-5  # as for the main logits


@pytest.mark.parametrize("variant", WITH_MTP)
def test_mtp_logits_match_the_reference(checkpoint, relative_l2, variant):
    case = checkpoint(variant)
    batch, length = case.token_ids.shape
    assert len(case.output.mtp_logits) == case.depth
    for k, logits in enumerate(case.output.mtp_logits):
        assert logits.shape == (batch, length, case.config["vocab_size"])
        rows = length - 1 - k
        assert relative_l2(logits[:, :rows], case.reference.mtp_logits[k]) <= TOLERANCE


@pytest.mark.parametrize("variant", WITH_MTP)
def test_mtp_logits_match_transformers(checkpoint, relative_l2, variant):
    """transformers 5.23 follows the released weights here and hands on the normed state."""
    from transformers.cache_utils import MtpCache

    case = checkpoint(variant)
    ids = torch.tensor(case.token_ids, dtype=torch.long)
    module = hf.load_transformers_mtp(case.transformers, case.weights)
    cache = MtpCache(config=case.transformers.config.get_mtp_config())
    with torch.no_grad():
        state = case.transformers.model(ids).last_hidden_state
        for k in range(case.depth):
            rows = ids.shape[1] - 1 - k
            positions = torch.arange(k + 1, k + 1 + rows)[None]
            state = module.forward_layer(
                k, state[:, :rows], positions, cache, input_ids=ids[:, k + 1 :]
            )
            want = module.shared_head(state)
            assert relative_l2(case.output.mtp_logits[k][:, :rows], want) <= TOLERANCE


def test_main_logits_are_the_same_without_mtp(checkpoint):
    case = checkpoint("two_mtp_modules")
    out = jax.jit(case.model.apply)(case.variables, case.token_ids)
    assert not out.mtp_logits
    # Another compilation may order sums differently: rounding only.
    np.testing.assert_allclose(out.logits, case.output.logits, rtol=0, atol=2e-5)


def test_module_k_sees_the_tokens_up_to_k_plus_one_ahead(checkpoint):
    """Entry k at position i depends on token i + k + 1 and on none after it."""
    case = checkpoint("two_mtp_modules")
    changed_at = 20
    changed = case.token_ids.copy()
    changed[:, changed_at] = (changed[:, changed_at] + 1) % case.config["vocab_size"]
    out = case.forward(case.variables, changed)
    for k in range(case.depth):
        difference = np.abs(np.asarray(out.mtp_logits[k] - case.output.mtp_logits[k]))
        per_position = difference.max(axis=(0, 2))
        first = changed_at - k - 1
        assert (per_position[:first] == 0).all()
        assert per_position[first] > 1e-3
