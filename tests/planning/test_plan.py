"""scripts/plan.py: its answers, its one-line errors, its exit codes; one real compilation."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.config import (
    BatchConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    TrainConfig,
)
from dsv3_jax.planning.chips import parse_topology
from dsv3_jax.planning.compiled import compile_step, over_memory
from dsv3_jax.planning.plan import make_plan
from dsv3_jax.planning.report import report
from dsv3_jax.planning.search import search

ROOT = Path(__file__).parents[2]
V3 = "configs/v3_671b.py"

# One MoE layer, as small as the TPU kernels take it.
SMALL = TrainConfig(
    model=ModelConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        num_nextn_predict_layers=0,
        max_position_embeddings=128,
    ),
    runtime=RuntimeConfig(compute_dtype="bfloat16", on_overflow="stop"),
    parallel=ParallelConfig(expert=2, fsdp=2),
    data=DataConfig(sequence_length=128),
    batch=BatchConfig(size=4, microbatch_size=4),
    total_tokens=1_000_000,
)


def _run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "scripts/plan.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_v3_fits_a_thousand_chips_and_not_eight():
    fits = _run(V3, "--topology", "v5p:8x8x16", "--memory-only")
    assert fits.returncode == 0, fits.stderr
    assert "mesh fsdp 16 x expert 64" in fits.stdout
    assert fits.stdout.rstrip().endswith("\nfits")
    small = ("--parallel.expert", "8", "--batch.microbatch-size", "8")
    tight = _run(V3, "--topology", "v5p:2x2x2", "--memory-only", *small)
    assert tight.returncode == 1, tight.stderr
    assert tight.stdout.rstrip().endswith("DOES NOT FIT")


def test_bad_input_is_one_line():
    result = _run(V3, "--topology", "v5x:8x8x16")
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "did you mean 'v5" in result.stderr


def test_without_libtpu_it_says_what_to_do(tmp_path):
    (tmp_path / "libtpu.py").write_text("raise ImportError('hidden by a test')")
    result = _run(V3, "--topology", "v5p:8x8x16", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "error: libtpu is not installed: pip install 'jax[tpu]', or plan with --memory-only"
    )


@pytest.mark.parametrize(
    ("topology", "complaint"),
    [
        (None, "no cluster given"),
        ("v5p:2x2x2", "must multiply to the 8 devices"),
        ("h100:16", "must multiply to the 16 devices"),
    ],
)
def test_what_is_wrong_is_said(topology, complaint):
    options = {"memory_only": True, "search": False, "compiled": 0, "table": False}
    with pytest.raises(ConfigError, match=complaint):
        report(SMALL, topology, **options)


def test_gpus_are_never_compiled_for():
    options = {"memory_only": False, "search": False, "compiled": 0, "table": False}
    text, fits = report(SMALL, "h100:4", **options)
    assert fits and "from shapes" in text and "compiled" not in text


def test_gpus_send_slots_and_tpus_the_rows_there_are():
    def sent(topology, way=None):
        runtime = dataclasses.replace(SMALL.runtime, expert_exchange=way)
        config = dataclasses.replace(SMALL, runtime=runtime)
        plan = make_plan(config, parse_topology(topology), compile=False)
        return {c.kind: c.sent for c in plan.collectives if c.kind.endswith("all-to-all")}

    ((kind, rows),) = sent("v5p:2x2x1").items()
    assert kind == "ragged-all-to-all"
    # A buffer of two equal shares.
    assert sent("h100:4") == sent("v5p:2x2x1", "slots") == {"all-to-all": 2 * rows}
    assert sent("h100:4", "ragged") == {"ragged-all-to-all": rows}


def test_a_search_ranks_what_fits():
    plans = search(SMALL, parse_topology("v5p:2x2x1"))
    assert plans and all(plan.fits for plan in plans)
    seconds = [plan.bound.exposed for plan in plans]
    assert seconds == sorted(seconds)
    assert {tuple(plan.sizes.values()) for plan in plans} > {(1, 4, 1, 1, 1), (1, 1, 4, 1, 1)}


def test_clusters_are_compared():
    options = {"memory_only": True, "search": True, "compiled": 0, "table": False}
    text, fits = report(SMALL, "v5p:2x2x1,v6e:1x1", **options)
    head, *rows = text.splitlines()
    assert fits and [row.split()[0] for row in rows] == ["v5p:2x2x1", "v6e:1x1"]


def test_every_parameter_is_in_the_table():
    options = {"memory_only": True, "search": False, "compiled": 0, "table": True}
    text, _ = report(SMALL, "v5p:2x2x1", **options)
    row = next(line for line in text.splitlines() if "experts/gate_up_proj" in line)
    assert [cell.strip() for cell in row.split("  ") if cell][1:] == [
        "1 x 8 expert x 128 fsdp x 2 x 128",
        "1 x 4 x 64 x 2 x 128",
    ]


def test_the_real_step_compiles_for_a_tpu():
    """Ahead of time with libtpu: our kernels in it, tokens travelling, everything in place."""
    pytest.importorskip("libtpu")
    compiled = compile_step(SMALL, parse_topology("v5p:2x2x1"))
    assert compiled.fits
    # The grouped products forward, again, and for two gradients each; attention's three.
    assert compiled.kernels >= 8
    assert compiled.outputs - compiled.aliased < 64 << 10  # metrics only: the state is donated
    kinds = {(c.kind, c.axes) for c in compiled.collectives}
    assert ("ragged-all-to-all", ("expert",)) in kinds
    assert ("all-gather", ("fsdp", "expert")) in kinds


@pytest.mark.parametrize(
    ("message", "needed", "there"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5, 15.75),
        ("memory required for HLO temporaries (36.01G) exceeds available HBM (15.75G).", 36, 15.75),
    ],
)
def test_the_compilers_words_for_too_little_memory(message, needed, there):
    found = [count / 2**30 for count in over_memory(message)]
    assert found == pytest.approx([needed, there], rel=1e-3)


@pytest.mark.slow
def test_a_plan_that_does_not_fit_is_a_result():
    """The compiler's refusal becomes numbers: tables that a v5e's memory does not hold."""
    pytest.importorskip("libtpu")
    large = dataclasses.replace(SMALL.model, vocab_size=2**23, hidden_size=512)
    config = dataclasses.replace(SMALL, model=large)
    plan = make_plan(config, parse_topology("v5e:2x2"), compile=True)
    assert not plan.fits and plan.compiled is not None
    assert plan.compiled.limit is not None and plan.compiled.needed > plan.compiled.limit
