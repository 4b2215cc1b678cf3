"""`ModelConfig.from_hf` on the family's published files, and the rules of every dataclass."""

import dataclasses
import json

import pytest

from dsv3_jax.config import (
    BatchConfig,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeScaling,
    TrainConfig,
)
from tests.oracles.released import KIMI_K2, MOONLIGHT, YARN
from tests.oracles.released import V3 as DEEPSEEK_V3


def _numbers(config, names):
    return tuple(getattr(config, name) for name in names.split())


def test_reads_deepseek_v3():
    config = ModelConfig.from_hf(DEEPSEEK_V3)
    assert config.rope_scaling == RopeScaling(40, 4096, 32, 1, 1.0, 1.0)
    for field in dataclasses.fields(ModelConfig):
        if field.name != "rope_scaling":
            assert getattr(config, field.name) == DEEPSEEK_V3[field.name]


def test_defaults_are_the_pretrained_671b_model():
    """Everything but the release's position scaling, and the report's initialisation."""
    config = ModelConfig.from_hf(DEEPSEEK_V3)
    expected = dataclasses.replace(config, rope_scaling=None, initializer_range=0.006)
    assert ModelConfig() == expected


def test_reads_moonlight():
    config = ModelConfig.from_hf(MOONLIGHT)
    assert config.q_lora_rank is None and config.rope_scaling is None
    names = "n_group topk_group n_routed_experts num_experts_per_tok n_shared_experts rms_norm_eps"
    assert _numbers(config, names) == (1, 1, 64, 6, 2, 1e-5)
    assert config.num_nextn_predict_layers == 0 and config.rope_theta == 50000.0
    assert ModelConfig.from_hf(MOONLIGHT | {"rope_scaling": None}) == config


def test_reads_kimi_k2():
    config = ModelConfig.from_hf(KIMI_K2)
    assert _numbers(config, "n_group n_routed_experts first_k_dense_replace") == (1, 384, 1)
    assert config.rope_scaling is not None
    assert config.rope_scaling.beta_fast == config.rope_scaling.beta_slow == 1.0


def test_reads_what_transformers_5_writes():
    """It renames rope_scaling to rope_parameters, moves theta there and adds derived keys."""
    transformers = pytest.importorskip("transformers")
    wanted = ("architectures", "auto_map", "quantization_config", "torch_dtype")
    values = {k: v for k, v in DEEPSEEK_V3.items() if k not in wanted}
    written = json.loads(transformers.DeepseekV3Config(**values).to_json_string(use_diff=False))
    assert "rope_parameters" in written and "rope_theta" not in written
    assert ModelConfig.from_hf(written) == ModelConfig.from_hf(DEEPSEEK_V3)
    unscaled = {k: v for k, v in MOONLIGHT.items() if k in values}
    written = json.loads(transformers.DeepseekV3Config(**unscaled).to_json_string(use_diff=False))
    assert ModelConfig.from_hf(written) == ModelConfig.from_hf(MOONLIGHT)


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_reads_rope_theta_beside_the_scaling(place):
    """Alone there, or at the top level with the same value."""
    bare = {k: v for k, v in DEEPSEEK_V3.items() if k not in ("rope_theta", "rope_scaling")}
    moved = bare | {place: YARN | {"rope_theta": 50000}}
    config = ModelConfig.from_hf(moved)
    assert config.rope_theta == 50000.0 and config.rope_scaling == RopeScaling()
    assert ModelConfig.from_hf(moved | {"rope_theta": 50000.0}) == config
    unscaled = ModelConfig.from_hf(bare | {place: {"rope_theta": 50000}})
    assert unscaled == dataclasses.replace(config, rope_scaling=None)
    assert ModelConfig.from_hf(bare).rope_theta == 10000.0


def test_refuses_two_spellings_that_differ():
    both = DEEPSEEK_V3 | {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000}}
    assert ModelConfig.from_hf(both) == ModelConfig.from_hf(DEEPSEEK_V3)
    both["rope_parameters"] = both["rope_parameters"] | {"factor": 8.0}
    with pytest.raises(ConfigError, match=r"rope_scaling=.* and rope_parameters=.* must say the"):
        ModelConfig.from_hf(both)


@pytest.mark.parametrize(
    "change",
    [{"n_group": None}, {"n_group": None, "topk_group": None}, {"n_group": 1, "topk_group": None}],
)
def test_no_groups_are_one_group(change):
    config = ModelConfig.from_hf(DEEPSEEK_V3 | change)
    assert (config.n_group, config.topk_group) == (1, 1)


def test_reads_newer_name_of_the_mtp_depth():
    raw = {k: v for k, v in DEEPSEEK_V3.items() if k != "num_nextn_predict_layers"}
    assert ModelConfig.from_hf(raw | {"num_mtp_layers": 2}).num_nextn_predict_layers == 2


def test_reads_file_folder_and_dictionary_alike(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DEEPSEEK_V3), encoding="utf-8")
    want = ModelConfig.from_hf(DEEPSEEK_V3)
    assert ModelConfig.from_hf(path) == ModelConfig.from_hf(str(tmp_path)) == want


@pytest.mark.parametrize("raw", [DEEPSEEK_V3, MOONLIGHT, KIMI_K2], ids=["v3", "moonlight", "kimi"])
def test_to_hf_comes_back(raw):
    config = ModelConfig.from_hf(raw)
    written = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(written) == config


def test_absent_mscale_is_not_the_default():
    yarn = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
    scaling = ModelConfig.from_hf(DEEPSEEK_V3 | {"rope_scaling": yarn}).rope_scaling
    assert scaling is not None
    assert scaling.mscale is None and scaling.mscale_all_dim is None
    assert (scaling.beta_fast, scaling.beta_slow) == (32, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_routed_expert": 256}, ["n_routed_expert", "did you mean 'n_routed_experts'"]),
        ({"sliding_window": 4096}, ["sliding_window"]),
        ({"model_type": "llama"}, ["model_type='llama'", "deepseek_v3"]),
        ({"scoring_func": "softmax"}, ["scoring_func='softmax'", "'sigmoid'"]),
        ({"topk_method": "group_limited_greedy"}, ["topk_method", "'noaux_tc'"]),
        ({"rope_interleave": False}, ["rope_interleave=False", "True"]),
        ({"attention_bias": True}, ["attention_bias=True"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq=2", "1"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings=True"]),
        ({"num_key_value_heads": 8}, ["num_key_value_heads=8", "num_attention_heads=128"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear'", "'yarn'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["original_max_position_embeddings"]),
        (
            {"rope_scaling": YARN | {"beta_fas": 3}},
            ["beta_fas", "did you mean 'beta_fast'"],
        ),
        ({"hidden_size": "7168"}, ["hidden_size='7168'", "integer"]),
        ({"norm_topk_prob": 1}, ["norm_topk_prob=1", "true or false"]),
        ({"rms_norm_eps": "1e-6"}, ["rms_norm_eps", "number"]),
        ({"hidden_size": None}, ["hidden_size=None", "integer"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling='yarn'", "object"]),
        ({"rope_scaling": YARN | {"factor": "40"}}, ["rope_scaling.factor='40'", "number"]),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0.5}},
            ["original_max_position_embeddings=0.5", "integer"],
        ),
        ({"rope_theta": "10000"}, ["rope_theta='10000'", "number"]),
        ({"rope_theta": None}, ["rope_theta=None", "number"]),
        (
            {"rope_scaling": YARN | {"rope_theta": 50000}},
            ["rope_theta=10000", "rope_scaling.rope_theta=50000", "equal"],
        ),
        ({"rope_scaling": YARN | {"rope_theta": "1"}}, ["rope_scaling.rope_theta='1'", "number"]),
        ({"n_group": 8, "topk_group": None}, ["topk_group=None", "integer"]),
    ],
)
def test_from_hf_refuses_other_networks_and_says_where(tmp_path, change, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DEEPSEEK_V3 | change), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(path)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_ignore_skips_named_keys_only():
    raw = DEEPSEEK_V3 | {"sliding_window": 4096, "other": 1}
    assert ModelConfig.from_hf(raw, ignore=["sliding_window", "other"]).hidden_size == 7168
    with pytest.raises(ConfigError, match="other"):
        ModelConfig.from_hf(raw, ignore=["sliding_window"])


@pytest.mark.parametrize("text", ["{", "[1, 2]"])
def test_broken_file_is_a_config_error_with_its_path(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="config.json"):
        ModelConfig.from_hf(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 0}, ["vocab_size=0", "positive"]),
        ({"rope_theta": 0.0}, ["rope_theta=0.0", "positive"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan", "positive"]),
        ({"rope_theta": float("inf")}, ["rope_theta=inf", "finite"]),
        ({"n_shared_experts": -1}, ["n_shared_experts=-1"]),
        ({"q_lora_rank": 0}, ["q_lora_rank=0", "null"]),
        ({"first_k_dense_replace": 62}, ["first_k_dense_replace=62", "num_hidden_layers=61"]),
        ({"qk_rope_head_dim": 63}, ["qk_rope_head_dim=63", "even"]),
        ({"n_routed_experts": 250}, ["n_routed_experts=250", "divisible by n_group=8"]),
        ({"topk_group": 9}, ["topk_group=9", "n_group=8"]),
        ({"n_routed_experts": 8}, ["n_routed_experts=8", "n_group=8", "two experts"]),
        ({"num_experts_per_tok": 129}, ["num_experts_per_tok=129", "128"]),
    ],
)
def test_model_rules(change, words):
    with pytest.raises(ConfigError) as error:
        ModelConfig(**change)
    message = str(error.value)
    assert all(word in message for word in [*words, "(ModelConfig)"]), message


@pytest.mark.parametrize(
    "change", [{"n_routed_experts": 8, "n_group": 1, "topk_group": 1}, {"q_lora_rank": None}]
)
def test_model_rules_allow_what_the_family_uses(change):
    assert dataclasses.replace(ModelConfig(), **change) != ModelConfig()


@pytest.mark.parametrize(
    ("section", "change", "word"),
    [
        (RopeScaling, {"factor": 0.5}, "factor=0.5"),
        (RopeScaling, {"beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast=1.0"),
        (RopeScaling, {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        (ParallelConfig, {"expert": 0}, "expert=0"),
        (ParallelConfig, {"expert": -1, "fsdp": -1}, "fsdp and expert"),
        (DataConfig, {"sequence_length": 1}, "sequence_length=1"),
        (DataConfig, {"fim_rate": 1.5}, "fim_rate=1.5"),
        (DataConfig, {"held_out_fraction": 0.0}, "held_out_fraction=0.0"),
        (DataConfig, {"seed": -1}, "seed=-1"),
        (BatchConfig, {"size": 10, "microbatch_size": 4}, "size=10"),
        (BatchConfig, {"size": 8, "microbatch_size": 4, "initial_size": 12}, "initial_size=12"),
        (OptimizerConfig, {"beta2": 1.0}, "beta2=1.0"),
        (OptimizerConfig, {"peak_lr": float("nan")}, "peak_lr=nan"),
        (OptimizerConfig, {"peak_lr": float("inf")}, "peak_lr=inf must be finite"),
        (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay=-0.1 must be finite and not neg"),
        (OptimizerConfig, {"clip_norm": 0.0}, "clip_norm=0.0"),
        (LossConfig, {"balance_weight": -1e-4}, "balance_weight=-0.0001"),
        (CheckpointConfig, {"keep": 0}, "keep=0"),
        (EvaluationConfig, {"temperature": -0.1}, "temperature=-0.1"),
        (TrainConfig, {"steps": 0}, "steps=0"),
        (TrainConfig, {"total_tokens": 2**45}, "2**32 sequences"),
        (TrainConfig, {"data": DataConfig(sequence_length=2**18)}, "max_position_embeddings"),
        (
            TrainConfig,
            {
                "data": DataConfig(sequence_length=4),
                "model": ModelConfig(num_nextn_predict_layers=3),
                "total_tokens": 100,
            },
            "num_nextn_predict_layers=3",
        ),
    ],
)
def test_section_rules(section, change, word):
    with pytest.raises(ConfigError) as error:
        section(**change)
    assert word in str(error.value) and "(" in str(error.value)


def test_faithful_behaviour_is_the_default():
    config = TrainConfig()
    assert config.model.num_nextn_predict_layers == 1 and config.model.n_group == 8
    assert (config.loss.mtp_weight, config.loss.mtp_weight_final) == (0.3, 0.1)
    assert (config.loss.balance_weight, config.loss.bias_update_speed) == (1e-4, 1e-3)
    optimizer = config.optimizer
    assert _numbers(optimizer, "beta1 beta2 weight_decay clip_norm") == (0.9, 0.95, 0.1, 1.0)
    assert _numbers(optimizer, "peak_lr decay_lr final_lr") == (2.2e-4, 2.2e-5, 7.3e-6)
    assert config.total_tokens == 14_800_000_000_000
    assert sum(_numbers(optimizer, "constant_tokens decay_tokens hold_tokens")) == 14_633 * 10**9
