"""One named test for every way ports of this model have silently gone wrong.

Most tests do two things: the library agrees with the reference, and the reference with the
mistake brought in is far away, so the first comparison would have seen it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dsv3_jax import load_pretrained, to_hf_state_dict
from dsv3_jax.config import (
    BatchConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from dsv3_jax.training.flops import parameter_counts, train_flops_per_token
from tests.oracles import hf, reference

TOLERANCE = 2e-5  # float32 rounding over a few layers is about 3e-6
FAR = 100 * TOLERANCE


def _assert_right_and_mistake_seen(case, relative_l2, mistake, *, depth=None):
    """The logits (of MTP module `depth`, or the main ones) are right, and `mistake` is far off."""
    wrong = case.reference_with(mistake)
    if depth is None:
        ours, right, wrong = case.output.logits, case.reference.logits, wrong.logits
    else:
        ours = case.output.mtp_logits[depth][:, : case.token_ids.shape[1] - 1 - depth]
        right, wrong = case.reference.mtp_logits[depth], wrong.mtp_logits[depth]
    assert relative_l2(ours, right) <= TOLERANCE
    assert relative_l2(wrong, right) > FAR or not torch.isfinite(wrong).all()
    assert relative_l2(ours, wrong) > FAR / 2 or not torch.isfinite(wrong).all()


# ---------------------------------------------------------------- gate


def test_combine_weights_are_the_unbiased_scores(checkpoint, relative_l2):
    _assert_right_and_mistake_seen(checkpoint("base"), relative_l2, "biased_combine_weights")


def test_masked_groups_are_minus_infinity_not_zero(checkpoint, relative_l2):
    """All biased scores of the first MoE layer are negative: a zero would win there."""
    case = checkpoint("base")
    first = case.config["first_k_dense_replace"]
    bias = torch.tensor(case.weights[f"model.layers.{first}.mlp.gate.e_score_correction_bias"])
    assert float((case.reference.routing[first].scores + bias).max()) < 0
    _assert_right_and_mistake_seen(case, relative_l2, "masked_groups_zero")


@pytest.fixture(scope="module")
def gate_only(checkpoint):
    """One MoE layer whose gate sees exactly the embedding, and its biases lie near 5.

    Attention adds nothing (o_proj is 0) and the embedding is +-1, whose norm is exactly 1, so the
    gate's input is the same in bfloat16 and float32 and any difference is the gate's own.
    """

    def change(config, weights):
        config |= {
            "vocab_size": 211,
            "num_hidden_layers": 1,
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
        }
        weights.clear()
        weights |= hf.random_weights(config, seed=34)
        rng = np.random.default_rng(34)
        prefix = "model.layers.0."
        signs = rng.choice([-1.0, 1.0], weights["model.embed_tokens.weight"].shape)
        weights["model.embed_tokens.weight"] = signs.astype(np.float32)
        weights[prefix + "self_attn.o_proj.weight"] *= 0
        weights[prefix + "post_attention_layernorm.weight"][:] = 1
        bias = 5 + rng.normal(0, 0.1, config["n_routed_experts"])
        weights[prefix + "mlp.gate.e_score_correction_bias"] = bias.astype(np.float32)

    return checkpoint("base", "gate_only", change)


@pytest.fixture(scope="module")
def bfloat16_model(gate_only):
    return load_pretrained(gate_only.folder, dtype="bfloat16")


def _chosen(case, *mistakes):
    """The experts of every vocabulary entry as one token each, sorted [V, K], by the reference."""
    weights = hf.as_torch(case.weights)
    prefix = "model.layers.0.mlp.gate."
    routing = reference.gate(
        case.config,
        weights[prefix + "weight"],
        weights[prefix + "e_score_correction_bias"],
        weights["model.embed_tokens.weight"],
        mistakes,
    )
    if not mistakes:
        assert float(routing.margin.min()) > 1e-5  # float32 decides every token as float64 does
    return routing.chosen.sort(-1).values.numpy()


def test_gate_is_float32_in_a_bfloat16_model(gate_only, bfloat16_model):
    """Router bias, gate weight and router logits: each in bfloat16 would re-route tokens."""
    model, variables = bfloat16_model
    every_token = np.arange(gate_only.config["vocab_size"], dtype=np.int32)[None]
    stats = jax.jit(model.apply)(variables, every_token).routing.moe_layers
    want = _chosen(gate_only)
    np.testing.assert_array_equal(np.sort(np.asarray(stats.topk_idx)[0, 0]), want)
    load = np.bincount(want.reshape(-1), minlength=gate_only.config["n_routed_experts"])
    np.testing.assert_array_equal(stats.load[0], load)
    for mistake in ("bf16_bias", "bf16_gate_weight", "bf16_router_logits"):
        assert (_chosen(gate_only, mistake) != want).any(), mistake


def test_bfloat16_load_keeps_gate_and_bias_in_float32(gate_only, bfloat16_model):
    _, variables = bfloat16_model
    kinds = {
        jax.tree_util.keystr(path): leaf.dtype
        for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]
    }
    full = {path for path, kind in kinds.items() if kind == jnp.float32}
    assert any("e_score_correction_bias" in path for path in full)
    assert any("['gate']['kernel']" in path for path in full)
    for path, kind in kinds.items():
        if "['mlp']['gate']" in path:
            assert kind == jnp.float32, path
        elif "kernel" in path or "experts" in path:
            assert kind == jnp.bfloat16, path
    prefix = "model.layers.0.mlp.gate."
    back = to_hf_state_dict(bfloat16_model[0].config, variables)
    for name in (prefix + "weight", prefix + "e_score_correction_bias"):
        np.testing.assert_array_equal(back[name], gate_only.weights[name])


# ---------------------------------------------------------------- positions


def test_rope_rotates_interleaved_pairs(checkpoint, relative_l2):
    _assert_right_and_mistake_seen(checkpoint("moonlight"), relative_l2, "rope_half_split")


def test_yarn_mscale_enters_the_softmax_scale_squared(checkpoint, relative_l2):
    _assert_right_and_mistake_seen(checkpoint("base"), relative_l2, "no_yarn_softmax_mscale")


def test_yarn_applies_below_the_original_length_too(checkpoint, relative_l2):
    """As in transformers; DeepSeek's inference code scales only longer sequences."""
    case = checkpoint("base")
    length = case.config["rope_scaling"]["original_max_position_embeddings"] - 5
    ours = jax.jit(case.model.apply)(case.variables, case.token_ids[:, :length]).logits
    right = case.reference_with(length=length).logits
    wrong = case.reference_with("yarn_only_past_original_length", length=length).logits
    assert relative_l2(ours, right) <= TOLERANCE
    assert relative_l2(ours, wrong) > FAR


def test_yarn_mscale_ratio_scales_cos_and_sin(checkpoint, relative_l2):
    """mscale 1.7 against mscale_all_dim 0.6; and both absent, where the default amplitude holds."""
    _assert_right_and_mistake_seen(checkpoint("two_mtp_modules"), relative_l2, "single_mscale")
    _assert_right_and_mistake_seen(checkpoint("all_dense"), relative_l2, "single_mscale")


def test_yarn_with_equal_betas(checkpoint, relative_l2):
    """The ramp has no width: once between two pairs (Kimi K2), once with both ends on one pair."""
    kimi = checkpoint("kimi")
    assert kimi.config["rope_scaling"]["beta_fast"] == kimi.config["rope_scaling"]["beta_slow"]
    assert relative_l2(kimi.output.logits, kimi.reference.logits) <= TOLERANCE
    _assert_right_and_mistake_seen(checkpoint("all_dense"), relative_l2, "yarn_ramp_unguarded")
    _assert_right_and_mistake_seen(checkpoint("all_dense"), relative_l2, "yarn_bounds_not_rounded")


def test_low_rank_norms_keep_epsilon_1e_6(checkpoint, relative_l2):
    """q_a_layernorm and kv_a_layernorm, in a model whose rms_norm_eps is 1e-5."""
    case = checkpoint("kimi")
    assert case.config["rms_norm_eps"] == 1e-5
    _assert_right_and_mistake_seen(case, relative_l2, "lora_norm_eps_from_config")


# ---------------------------------------------------------------- multi-token prediction


def test_mtp_concatenates_the_embedding_first(checkpoint, relative_l2):
    _assert_right_and_mistake_seen(checkpoint("base"), relative_l2, "mtp_hidden_first", depth=0)


@pytest.mark.parametrize(
    "mistake", ["mtp_no_shared_head_norm", "mtp_main_norm_for_shared_head_norm"]
)
def test_mtp_has_its_own_shared_head_norm(checkpoint, relative_l2, mistake):
    _assert_right_and_mistake_seen(checkpoint("base"), relative_l2, mistake, depth=0)


def test_mtp_takes_the_main_state_after_the_final_norm(checkpoint, relative_l2):
    _assert_right_and_mistake_seen(checkpoint("base"), relative_l2, "mtp_pre_norm_hidden", depth=0)


def test_second_mtp_module_takes_the_state_after_shared_head_norm(checkpoint, relative_l2):
    case = checkpoint("two_mtp_modules")
    _assert_right_and_mistake_seen(case, relative_l2, "mtp_handover_before_norm", depth=1)


def test_mtp_layer_index_is_the_number_of_hidden_layers(checkpoint):
    """The modules' tensors come from, and go to, layer 4 after 0-3, and 1 and 2 after 0."""
    for variant, indices in (("base", {4}), ("two_mtp_modules", {1, 2})):
        case = checkpoint(variant)
        names = to_hf_state_dict(case.model.config, case.variables)
        found = {int(name.split(".")[2]) for name in names if name.endswith("eh_proj.weight")}
        assert found == indices


def test_mtp_tensors_are_loaded_or_refused_never_dropped(checkpoint, tmp_path):
    case = checkpoint("base")
    # Tensors the config does not account for.
    without = {**case.config, "num_nextn_predict_layers": 0}
    folder = hf.save(tmp_path / "surplus", without, case.weights)
    with pytest.raises(Exception, match=r"layers\.4\."):
        load_pretrained(folder, dtype="float32")
    # Tensors the config promises.
    for missing in ("eh_proj.weight", "shared_head.norm.weight", "mlp.experts.7.up_proj.weight"):
        name = f"model.layers.4.{missing}"
        weights = {key: array for key, array in case.weights.items() if key != name}
        folder = hf.save(tmp_path / missing, case.config, weights)
        with pytest.raises(Exception, match=name.replace(".", r"\.")):
            load_pretrained(folder, dtype="float32")


def test_mtp_copies_of_embedding_and_head_must_be_the_main_ones(checkpoint, tmp_path):
    """They are the main model's; a checkpoint with others is another network, and is refused."""
    case = checkpoint("base")
    for name in ("model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"):
        weights = {**case.weights, name: case.weights[name] + 1}
        folder = hf.save(tmp_path / name, case.config, weights)
        with pytest.raises(Exception, match=name.replace(".", r"\.")):
            load_pretrained(folder, dtype="float32")


# ---------------------------------------------------------------- loading


def test_unknown_tensor_is_refused_by_name(checkpoint, tmp_path):
    case = checkpoint("base")
    surplus = "model.layers.1.self_attn.q_norm.weight"
    weights = {**case.weights, surplus: np.ones(8, np.float32)}
    with pytest.raises(Exception, match=surplus.replace(".", r"\.")):
        load_pretrained(hf.save(tmp_path, case.config, weights), dtype="float32")


def test_tensor_of_another_shape_is_refused_by_name(checkpoint, tmp_path):
    case = checkpoint("base")
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    weights = {**case.weights, name: case.weights[name].T}
    with pytest.raises(Exception, match=name.replace(".", r"\.")):
        load_pretrained(hf.save(tmp_path, case.config, weights), dtype="float32")


def test_rotary_inv_freq_leftovers_are_skipped(checkpoint, tmp_path):
    case = checkpoint("base")
    leftovers = {
        f"model.layers.{index}.self_attn.rotary_emb.inv_freq": np.full(4, 7.0, np.float32)
        for index in range(5)
    }
    folder = hf.save(tmp_path, case.config, {**case.weights, **leftovers})
    _, variables = load_pretrained(folder, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, variables, case.variables)


# ---------------------------------------------------------------- balancing


@dataclasses.dataclass
class Step:
    """One optimizer step, and what the reference has for it."""

    case: Any
    config: TrainConfig
    metrics: Any
    biases: dict[str, np.ndarray]  # by released name, after the step
    reference: reference.Output
    token_ids: torch.Tensor
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def step(checkpoint):
    """A step of two accumulated microbatches, layers rematerialised, MTP of depth 2.

    Rates, decay and the weights of the losses are large, so each would show where it must not.
    """
    from dsv3_jax.training.optimizer import make_optimizer
    from dsv3_jax.training.step import TrainState, make_train_step

    case = checkpoint("two_mtp_modules")
    assert case.model.runtime.remat_policy == "full"
    length = case.token_ids.shape[1] - 1
    config = TrainConfig(
        model=case.model.config,
        data=DataConfig(sequence_length=length),
        batch=BatchConfig(size=2, microbatch_size=1),
        optimizer=OptimizerConfig(peak_lr=0.1, warmup_steps=1, weight_decay=0.5),
        loss=LossConfig(mtp_weight=0.3, balance_weight=0.5, bias_update_speed=1e-3),
        total_tokens=10_000,
    )
    params, router_state = case.variables["params"], case.variables["router_state"]
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        step=zero,
        sequences=jnp.zeros((), jnp.uint32),
        params=params,
        router_state=router_state,
        opt_state=make_optimizer(config.optimizer).init(params),
        skipped=zero,
        skipped_in_row=zero,
    )
    batch = {"tokens": jnp.asarray(case.token_ids)[:, None]}
    new, metrics = jax.jit(make_train_step(case.model, config))(state, batch)
    tensors = to_hf_state_dict(
        case.model.config, {"params": new.params, "router_state": new.router_state}
    )
    biases = {n: np.asarray(a) for n, a in tensors.items() if n.endswith("correction_bias")}
    ids = torch.tensor(case.token_ids, dtype=torch.long)
    weights = hf.as_torch(case.weights, requires_grad=True)
    out = reference.forward(case.config, weights, ids[:, :-1])
    return Step(case, config, metrics, biases, out, ids, weights)


def test_load_is_counted_once_under_remat_and_accumulation(step):
    """The load of the whole batch: every token of every layer that has a next token, once."""
    want = np.stack([step.reference.routing[i].load().numpy() for i in range(3)])
    np.testing.assert_array_equal(step.metrics.load, want)
    batch, length = step.token_ids[:, :-1].shape
    choices = batch * step.case.config["num_experts_per_tok"]
    assert list(want.sum(-1)) == [choices * length, choices * (length - 1), choices * (length - 2)]


def test_every_gate_bias_is_updated_from_its_own_load_and_by_nothing_else(step):
    """The MTP modules' too; neither the learning rate nor the weight decay touches them."""
    assert len(step.biases) == 3
    speed = step.config.loss.bias_update_speed
    for index in range(3):
        name = f"model.layers.{index}.mlp.gate.e_score_correction_bias"
        before = torch.tensor(step.case.weights[name])
        want = reference.updated_bias(before, step.reference.routing[index].load(), speed)
        assert step.biases[name].dtype == np.float32
        np.testing.assert_allclose(step.biases[name], want.numpy(), rtol=0, atol=1e-6)
        moved = np.abs(step.biases[name] - before.numpy())
        assert (moved > 0.9 * speed).sum() > len(moved) / 2


def test_losses_and_their_gradient_match_the_reference(step):
    """Cross-entropy, MTP averaged over depths, sequence-wise balance summed over all layers."""
    ids, out, config = step.token_ids, step.reference, step.config.loss
    main = reference.cross_entropy(out.logits, ids, 1)
    depth = len(out.mtp_logits)
    mtp = sum(reference.cross_entropy(out.mtp_logits[k], ids, k + 2) for k in range(depth)) / depth
    balance = sum(
        reference.balance_loss(step.case.config, routing, len(ids), 1.0)
        for routing in out.routing.values()
    )
    got = step.metrics
    assert float(got.main_loss) == pytest.approx(main.item(), rel=1e-5)
    assert float(got.mtp_loss) == pytest.approx(mtp.item(), rel=1e-5)
    assert float(got.balance_loss) == pytest.approx(balance.item(), rel=1e-5)
    loss = main + config.mtp_weight * mtp + config.balance_weight * balance
    assert float(got.loss) == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    grads = [w.grad for w in step.weights.values() if w.grad is not None]
    norm = float(torch.sqrt(sum((g**2).sum() for g in grads)))
    assert float(got.grad_norm) == pytest.approx(norm, rel=1e-4)


def test_bias_takes_no_gradient(checkpoint):
    """It is no parameter, and no gradient reaches it through the choice of experts either."""
    case = checkpoint("base")
    params = jax.tree_util.tree_flatten_with_path(case.variables["params"])[0]
    assert not any("bias" in jax.tree_util.keystr(path) for path, _ in params)

    def loss(router_state):
        variables = {"params": case.variables["params"], "router_state": router_state}
        out = case.model.apply(variables, case.token_ids, mtp=True)
        return (out.logits**2).mean() + (out.mtp_logits[0] ** 2).mean()

    grads = jax.tree.leaves(jax.jit(jax.grad(loss))(case.variables["router_state"]))
    assert len(grads) == 2
    assert all(not np.asarray(gradient).any() for gradient in grads)


# ---------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def tokenizer():
    from dsv3_jax.data.tokenizer import load_tokenizer

    data = DataConfig(tokenizer="deepseek-v3")
    return load_tokenizer(data, vocab_size=129280, texts=lambda: iter(()))


def test_prompt_starts_with_bos_although_the_tokenizer_file_adds_none(tokenizer):
    assert tokenizer.encode("def f")[0] != tokenizer.bos_id
    assert tokenizer.encode_prompt("def f") == [tokenizer.bos_id, *tokenizer.encode("def f")]
    assert tokenizer.bos_id == 0 and tokenizer.eos_id == 1  # the released config.json


@pytest.mark.parametrize("text", [" a", "a  b", "\n\n  if x:\n\t\ty  ", "a \u00e9 \u4f60 ", "   "])
def test_spaces_survive_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---------------------------------------------------------------- counting

V3 = dataclasses.replace(ModelConfig(), num_nextn_predict_layers=1)


def _matmul_weights(config, *, mtp):
    """Weights one token is multiplied with, summed over the released tensors themselves."""
    layers = config["num_hidden_layers"]
    share = config["num_experts_per_tok"] / config["n_routed_experts"]
    total = 0.0
    for name, shape in hf.tensor_shapes(config).items():
        beyond = name.startswith("model.layers.") and int(name.split(".")[2]) >= layers
        if len(shape) == 1 or "embed_tokens" in name or (beyond and not mtp):
            continue
        total += shape[0] * shape[1] * (share if ".mlp.experts." in name else 1)
    return total


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("size", ["tiny", "671B"])
def test_flops_count_mtp_head_and_eh_proj_and_half_of_attention(size, mtp):
    config = hf.config_of("two_mtp_modules") if size == "tiny" else V3.to_hf()
    length = 4096
    got = train_flops_per_token(ModelConfig.from_hf(config), length, mtp=mtp)
    layers = config["num_hidden_layers"] + (config["num_nextn_predict_layers"] if mtp else 0)
    width = config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]
    # Token t multiplies with t + 1 keys: half the square, up to the diagonal.
    attention = 6 * layers * config["num_attention_heads"] * width * length / 2
    assert got == pytest.approx(6 * _matmul_weights(config, mtp=mtp) + attention, rel=1e-3)
    if size == "671B" and not mtp:
        assert got == pytest.approx(250.45e9, rel=1e-4)


def test_parameter_counts_are_the_sum_of_the_tensors():
    config = hf.config_of("two_mtp_modules")
    own = ("embed_tokens.weight", "shared_head.head.weight")
    main = mtp = 0
    for name, shape in hf.tensor_shapes(config).items():
        beyond = name.startswith(("model.layers.1.", "model.layers.2."))
        if name.endswith("correction_bias") or (beyond and name.endswith(own)):
            continue
        if beyond:
            mtp += int(np.prod(shape))
        else:
            main += int(np.prod(shape))
    counts = parameter_counts(ModelConfig.from_hf(config))
    assert (counts.total, counts.mtp) == (main, mtp)
