"""A run small enough for a test: one dense and one MoE layer with MTP, on a made-up corpus."""

import os

import jax
import pytest

_CONFIG = """
from dsv3_jax.config import *

def get_config():
    return TrainConfig(
        model=ModelConfig(
            vocab_size=300, hidden_size=24, intermediate_size=40, moe_intermediate_size=12,
            num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=14,
            kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
            n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=2, n_group=4, topk_group=2,
            max_position_embeddings=512, initializer_range=0.05,
        ),
        runtime=RuntimeConfig(compute_dtype="float32", remat_policy="none"),
        data=DataConfig(corpus={corpus!r}, cache_dir={cache!r}, sequence_length=16,
                        held_out_fraction=0.3),
        batch=BatchConfig(size=4, microbatch_size=2),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2, constant_tokens=10**6),
        checkpoint=CheckpointConfig(every_steps=3, keep=2),
        evaluation=EvaluationConfig(every_steps=4, sequences=3, final_sequences=5,
                                    prompt="the", sample_tokens=6),
        total_tokens=8 * 4 * 16,
    )
"""


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    """Path of a configuration file: 8 steps of 2 x 2 sequences on a small folder of text."""
    root = tmp_path_factory.mktemp("run")
    corpus = root / "corpus"
    corpus.mkdir()
    words = "the cat sat on a mat while dogs ran far and birds sang of old rivers".split()
    for number in range(20):
        text = " ".join(words[(i * (number + 3) + i * i) % len(words)] for i in range(120))
        (corpus / f"{number}.txt").write_text(text)
    path = root / "config.py"
    path.write_text(_CONFIG.format(corpus=str(corpus), cache=str(root / "cache")))
    return path


@pytest.fixture(scope="session")
def config(config_file):
    """The same configuration, loaded."""
    from dsv3_jax.cli import load_config

    return load_config(config_file)


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """Runs compile the same functions, in every process of the tests and in its children."""
    base = tmp_path_factory.getbasetemp()
    folder = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]
