"""`--init-from`: what a run takes over from weights, what begins anew, and what is refused."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest

from dsv3_jax import cli, load_pretrained
from dsv3_jax.checkpoints.from_hf import from_hf
from dsv3_jax.checkpoints.inspect import describe
from dsv3_jax.checkpoints.store import CheckpointStore, describe_run
from dsv3_jax.data.pipeline import open_data
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training import loop
from dsv3_jax.training.init_from import find_start
from dsv3_jax.training.loop import train
from dsv3_jax.training.metrics import read_jsonl
from dsv3_jax.training.opening import start_state
from dsv3_jax.training.step import StepMetrics, state_of
from tests.oracles import hf


@pytest.fixture(scope="module")
def weights(config, tmp_path_factory):
    """Factory: a Hugging Face folder of the run's network with some fields changed."""
    made = {}

    def make(**changes):
        key = str(changes)
        if key not in made:
            raw = config.model.to_hf() | changes
            folder = tmp_path_factory.mktemp("weights")
            made[key] = hf.save(folder, raw, hf.random_weights(raw, seed=1))
        return made[key]

    return make


def started(config, folder, store, **changes):
    """The state with which a run of `config` starts from `folder`."""
    config = dataclasses.replace(config, init_from=str(folder), **changes)
    model = Transformer(config.model, config.runtime)
    return start_state(CheckpointStore(store), model, config, None, None, find_start(config))


def save_run(folder, state, config, step=0):
    """As a run of `config` would leave it."""
    store = CheckpointStore(folder / "checkpoints")
    store.save(step, state, describe_run(config, sequences=4 * step))
    store.close()


def with_modules(config, count):
    model = dataclasses.replace(config.model, num_nextn_predict_layers=count)
    return dataclasses.replace(config, model=model)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("kind", ["Hugging Face folder", "converted folder", "run"])
def test_weights_and_biases_are_taken_and_the_rest_begins_anew(kind, config, weights, tmp_path):
    folder = weights()
    _, expected = load_pretrained(folder, dtype="float32")
    if kind == "converted folder":
        from_hf(folder, tmp_path / "source", dtype="float32")
    elif kind == "run":
        moved = jax.tree.map(lambda leaf: leaf + 1, state_of(expected, config))
        save_run(tmp_path / "source", dataclasses.replace(moved, **expected), config, step=7)
    source = folder if kind == "Hugging Face folder" else tmp_path / "source"
    start = find_start(dataclasses.replace(config, init_from=str(source)))
    assert start.record() == {
        "path": str(source),
        "kind": kind,
        "step": {"converted folder": 0, "run": 7}.get(kind),
        "mtp_modules": 1,
    }
    state = started(config, source, tmp_path)
    assert_equal({"params": state.params, "router_state": state.router_state}, expected)
    bias = state.router_state["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"]
    assert np.abs(bias).min() > 0
    rest = jax.tree.leaves(dataclasses.replace(state, params={}, router_state={}))
    # Counters of the state and of the optimizer, and both moments.
    assert len(rest) == 5 + 2 * len(jax.tree.leaves(state.params))
    assert not any(np.asarray(leaf).any() for leaf in rest)


def test_mtp_modules_that_only_one_side_has(config, weights, tmp_path, caplog):
    caplog.set_level(logging.INFO, "dsv3_jax")
    state = started(config, weights(num_nextn_predict_layers=2), tmp_path)
    _, two = load_pretrained(weights(num_nextn_predict_layers=2), dtype="float32")
    assert_equal(state.params, {k: v for k, v in two["params"].items() if k != "mtp_1"})
    assert "1 of the 2 MTP modules of the weights are used" in caplog.text
    caplog.clear()
    state = started(with_modules(config, 2), weights(), tmp_path, init_missing_mtp=True)
    assert "1 of 2 MTP modules begin at random: the weights have 1" in caplog.text
    _, one = load_pretrained(weights(), dtype="float32")
    random, bias = state.params.pop("mtp_1"), state.router_state.pop("mtp_1")
    assert_equal({"params": state.params, "router_state": state.router_state}, one)
    spread = np.std(random["eh_proj"]["kernel"])
    assert spread == pytest.approx(config.model.initializer_range, rel=0.1)
    assert_equal(random["shared_head_norm"]["weight"], np.ones(24))
    assert_equal(bias["layer"]["mlp"]["gate"]["e_score_correction_bias"], np.zeros(8))


def count_a_step(_, state, rows):
    numbers = {field.name: np.float32(1) for field in dataclasses.fields(StepMetrics)}
    counts = dict.fromkeys(("skipped", "skipped_in_row", "buffer_overflows"), np.int32(0))
    metrics = StepMetrics(**numbers | counts | {"load": np.ones((2, 8), np.int32)})
    sequences = state.sequences + len(rows)
    return dataclasses.replace(state, step=state.step + 1, sequences=sequences), metrics


def test_a_run_says_where_it_started_and_goes_on_from_its_checkpoint(
    config, weights, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "dsv3_jax")
    # All that would take long to compile; test_mesh.py has the first loss.
    monkeypatch.setattr(loop._Step, "__call__", count_a_step)
    monkeypatch.setattr(loop._Run, "evaluate", lambda *_: 1.0)
    monkeypatch.setattr(loop, "write_report", lambda *_: "")
    source, out = weights(), tmp_path / "run"
    config = dataclasses.replace(config, steps=1, init_from=str(source))
    assert train(config, out, resume=True) == 0  # nothing to resume yet
    assert f"started from {source} (Hugging Face folder)" in caplog.text
    caplog.clear()
    assert train(dataclasses.replace(config, steps=2), out, resume=True) == 0
    assert "resumed from step 1" in caplog.text
    assert f"{source} is not read: {out} holds a run (--init-from)" in caplog.text
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [1, 2]
    metadata = CheckpointStore(out / "checkpoints").read_metadata()
    assert metadata["init_from"]["path"] == str(source)
    _, expected = load_pretrained(source, dtype="float32")
    assert_equal(load_pretrained(out, dtype="float32")[1], expected)
    assert f"started from  {source} (Hugging Face folder)" in describe(out).splitlines()


def end_of(capsys, config_file, out, *options):
    """(exit code, lines on stderr that are no progress) of train.py, in this process."""

    def main(argv):
        config, directory, resume = cli.parse_train_args(argv)
        return train(config, directory, resume=resume)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["train.py", str(config_file), "--out", str(out), *options])
        cli.run(main)
    lines = capsys.readouterr().err.splitlines()
    return end.value.code, [line for line in lines if line.startswith("error:")]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"vocab_size": 310},
            "",
            "model.vocab_size=300 must be 310 as in the weights ({0}, --init",
        ),
        ({"q_lora_rank": None}, "", "model.q_lora_rank=14 must be None as in the weights ({0}"),
        ({"rope_theta": 5e4}, "", "model.rope_theta=10000.0 must be 50000.0"),
        (
            {"rope_scaling": hf.YARN},
            "--model.rope-scaling.factor 8",
            "model.rope_scaling.factor=8.0 must be 40.0 as in the weights",
        ),
        ({"rope_scaling": hf.YARN}, "", "model.rope_scaling=None must be RopeScaling(factor=40.0"),
        (
            {"num_nextn_predict_layers": 0},
            "",
            "model.num_nextn_predict_layers=1 must be at most 0, the MTP modules that the weights "
            "have, unless --init-missing-mtp True begins the others at random ({0}, --init-from)",
        ),
        # How long a context may be asked for, and how a network begins, is no other network.
        (
            {"max_position_embeddings": 99, "initializer_range": 0.5, "hidden_size": 22},
            "",
            "model.hidden_size=24 must be 22",
        ),
    ],
)
def test_another_network_is_one_line(
    config_file, weights, tmp_path, capsys, changes, options, message
):
    """Before anything is written."""
    folder = weights(**changes)
    where = ("--init-from", str(folder), *options.split())
    code, lines = end_of(capsys, config_file, tmp_path / "run", *where)
    assert code == 2 and len(lines) == 1 and message.format(folder) in lines[0]
    assert not (tmp_path / "run").exists()


def test_what_is_no_weights_or_damaged_is_one_line(config, config_file, weights, tmp_path, capsys):
    def refused(name, message):
        where = ("--init-from", str(tmp_path / name))
        code, lines = end_of(capsys, config_file, tmp_path / "out", *where)
        assert code == 2 and len(lines) == 1, lines
        assert message in lines[0] and lines[0].endswith("(--init-from)")

    refused("nowhere", f"neither a config.json nor checkpoints/ of a run ({tmp_path / 'nowhere'})")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    refused("empty", f"no checkpoint in {tmp_path / 'empty' / 'checkpoints'}")
    raw = config.model.to_hf()
    tensors = hf.random_weights(raw)
    lacking = {name: tensor for name, tensor in tensors.items() if "1.eh_proj" not in name}
    lacking.pop("model.layers.2.eh_proj.weight")
    hf.save(tmp_path / "lacking", raw, lacking)
    refused("lacking", "tensor 'model.layers.2.eh_proj.weight' is missing")
    file = hf.save(tmp_path / "cut", raw, tensors) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused("cut", f"truncated? ({file})")
    _, variables = load_pretrained(weights(), dtype="float32")
    save_run(tmp_path / "run", state_of(variables, config), config)
    largest = max((tmp_path / "run").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    refused("run", f"step 0 in {tmp_path / 'run' / 'checkpoints'} is damaged")


def test_another_tokenizer_is_one_line(config, config_file, weights, tmp_path, capsys):
    folder = tmp_path / "weights"
    shutil.copytree(weights(), folder)
    file = folder / "tokenizer.json"
    open_data(config).tokenizer.save(file)
    fields = json.loads(file.read_text(encoding="utf-8"))
    vocab = fields["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(fields), encoding="utf-8")
    where = ("--init-from", str(folder))
    code, lines = end_of(capsys, config_file, tmp_path / "out", *where)
    assert code == 2 and lines == [
        f"error: data.tokenizer='corpus-bpe' must be that of the weights, but has other entries: "
        f"--data.tokenizer {file} is theirs ({folder}, --init-from)"
    ]
    file.write_text("{}")
    code, lines = end_of(capsys, config_file, tmp_path / "out", *where)
    assert (
        code == 2 and len(lines) == 1 and f"byte-level BPE with all 256 bytes ({file})" in lines[0]
    )
