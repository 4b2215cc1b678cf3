"""The command line: overrides, one-line errors and exit codes."""

import dataclasses
import fnmatch
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.checkpoints.store import config_to_dict
from dsv3_jax.cli import OneLineParser, load_config, parse_train_args, run
from dsv3_jax.config import ConfigError, RopeScaling, TrainConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    """A working directory with configs/small.py and configs/yarn.py."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    folder.mkdir()
    head = "from dsv3_jax.config import ModelConfig, RopeScaling, TrainConfig\n"
    (folder / "small.py").write_text(head + "def get_config():\n    return TrainConfig(seed=3)\n")
    (folder / "yarn.py").write_text(
        head + "def get_config():\n"
        "    return TrainConfig(model=ModelConfig(rope_scaling=RopeScaling(factor=4.0)))\n"
    )
    return folder


def parse(*options: str) -> TrainConfig:
    config, out, resume = parse_train_args(["configs/small.py", "--out", "runs/a", *options])
    assert (out, resume) == (Path("runs/a"), False)
    return config


def changed(config: TrainConfig) -> dict:
    """{dotted name: value} of what differs from configs/small.py."""

    def flat(values: dict, prefix: str = "") -> dict:
        names: dict = {}
        for name, value in values.items():
            inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
            names |= inner if inner is not None else {prefix + name: value}
        return names

    before = flat(config_to_dict(TrainConfig(seed=3)))
    return {k: v for k, v in flat(config_to_dict(config)).items() if before.get(k, ...) != v}


def test_no_override_is_the_file_as_it_is():
    assert parse() == load_config("configs/small.py") == TrainConfig(seed=3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--optimizer.peak-lr", "3e-4"], {"optimizer.peak_lr": 3e-4}),
        (["--optimizer.peak_lr", "3e-4"], {"optimizer.peak_lr": 3e-4}),
        (["--optimizer.peak_lr=3e-4"], {"optimizer.peak_lr": 3e-4}),
        (["--steps", "9", "--steps=10"], {"steps": 10}),
        (
            ["--init-from", "v3", "--init-missing-mtp", "True"],
            {"init_from": "v3", "init_missing_mtp": True},
        ),
        (["--steps", "None"], {}),
        (["--seed=4", "--data.seed=5"], {"seed": 4, "data.seed": 5}),
        (["--model.q-lora-rank", "None"], {"model.q_lora_rank": None}),
        (["--model.norm-topk-prob", "False"], {"model.norm_topk_prob": False}),
        (["--runtime.remat-policy", "dots"], {"runtime.remat_policy": "dots"}),
        (["--data.held-out", "a b=c"], {"data.held_out": "a b=c"}),
        (["--evaluation.prompt", "--x"], {"evaluation.prompt": "--x"}),
        # Rules between fields see all the changes together, whatever their order.
        (
            ["--model.n-group", "5", "--model.n-routed-experts", "10", "--model.topk-group=5"],
            {"model.n_group": 5, "model.n_routed_experts": 10, "model.topk_group": 5},
        ),
    ],
)
def test_override(options, expected):
    assert changed(parse(*options)) == expected


def test_a_section_left_at_none_starts_from_its_defaults():
    config = parse("--model.rope-scaling.factor", "8")
    assert config.model.rope_scaling == RopeScaling(factor=8.0)
    config, _, _ = parse_train_args(
        ["configs/yarn.py", "--out=o", "--model.rope_scaling.mscale=None"]
    )
    assert config.model.rope_scaling == RopeScaling(factor=4.0, mscale=None)
    config, _, _ = parse_train_args(["configs/yarn.py", "--out=o", "--model.rope-scaling", "None"])
    assert config.model.rope_scaling is None


def test_arguments_may_come_in_any_order():
    config, out, resume = parse_train_args(
        ["--resume", "--seed", "8", "--out", "x", "configs/yarn.py"]
    )
    assert (config.seed, out, resume) == (8, Path("x"), True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no configuration file given"),
        (["configs/small.py"], "no output directory given (--out DIR)"),
        (["configs/small.py", "--out", ""], "no output directory given (--out DIR)"),
        (["configs/small.py", "--out"], "--out needs a value"),
        (["configs/small.py", "more", "--out", "x"], "unexpected argument 'more'"),
        (["--optimizer.peek-lr", "3"], "--optimizer.peek-lr (did you mean '--optimizer.peak-lr'?)"),
        (["--optimiser", "3"], "unknown option --optimiser"),
        (["--model", "3"], "unknown option --model"),
        (["--steps", "3.5"], "--steps '3.5' must be an integer or None"),
        (["--init-missing-mtp=True"], "init_missing_mtp=True must come with init_from"),
        (["--optimizer.peak-lr", "abc"], "--optimizer.peak-lr 'abc' must be a number"),
        (["--model.norm-topk-prob=maybe"], "'maybe' must be True or False"),
        (["--runtime.remat-policy=all"], "must be one of none, full, dots, attention"),
        (["--model.rope-scaling", "3"], "--model.rope-scaling '3' must be None"),
        (["--model.n-group", "5"], "n_routed_experts=256 must be divisible by n_group=5"),
        (["--parallel.expert", "0"], "expert=0 must be positive or -1"),
        (["--model.rope-scaling.factor", "0.5"], "factor=0.5 must be at least 1 (RopeScaling)"),
        (["configs/smal.py", "--out=x"], "configs/smal.py (did you mean 'configs/small.py'?)"),
        (["small", "--out=x"], "no configuration file small (did you mean 'configs/small.py'?)"),
        (["other/zzz.py", "--out=x"], "no configuration file other/zzz.py"),
    ],
)
def test_bad_arguments_are_one_line(argv, message):
    if argv and argv[0].startswith("--"):
        argv = ["configs/small.py", "--out", "x", *argv]
    with pytest.raises(ConfigError) as caught:
        parse_train_args(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 3\n", "has no get_config()"),
        ("def get_config(:\n", "raised SyntaxError"),
        ("def get_config():\n    return 3\n", "must return a TrainConfig, not 3"),
        ("def get_config():\n    return 1 / 0\n", "raised ZeroDivisionError: division by zero"),
        ("import nothing_of_this_name\n", "raised ModuleNotFoundError"),
    ],
)
def test_a_bad_configuration_file_is_explained(configs, source, message):
    (configs / "bad.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        load_config("configs/bad.py")
    assert message in str(caught.value) and "configs/bad.py" in str(caught.value)


def test_help_names_every_field_and_the_defaults_of_the_file(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_train_args(["configs/small.py", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for section in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(section.type):
            for field in dataclasses.fields(section.type):
                if field.name != "rope_scaling":
                    assert f"--{section.name}.{field.name}".replace("_", "-") in text
    assert "usage: train.py CONFIG --out DIR [--resume]" in text
    assert "(default: 3)" in text  # the file's seed


def finish(main, monkeypatch, capsys, traceback: str = "") -> tuple[int, str]:
    """(exit code, stderr) of `run(main)`."""
    monkeypatch.setattr(sys, "argv", ["prog", "a", "b"])
    monkeypatch.setenv("DSV3_TRACEBACK", traceback)
    with pytest.raises(SystemExit) as caught:
        run(main)
    return caught.value.code, capsys.readouterr().err


def raiser(error: BaseException):
    def main(argv):
        assert argv == ["a", "b"]
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("seed=-1 must\nnot be negative"), 2, "error: seed=-1 must not be negative"),
        (
            FileNotFoundError(2, "No such file or directory", "corpus.txt"),
            2,
            "error: No such file or directory: corpus.txt",
        ),
        (
            RuntimeError("loss is NaN"),
            1,
            "error: loss is NaN (DSV3_TRACEBACK=1 shows the traceback)",
        ),
        (
            OSError(28, "No space left on device", "m.jsonl"),
            1,
            "error: No space left on device: m.jsonl (DSV3_TRACEBACK=1 shows the traceback)",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_and_a_code(error, code, line, monkeypatch, capsys):
    assert finish(raiser(error), monkeypatch, capsys) == (code, line + "\n")


def test_success_and_explicit_codes_pass_through(monkeypatch, capsys):
    assert finish(lambda argv: None, monkeypatch, capsys) == (0, "")
    assert finish(lambda argv: 1, monkeypatch, capsys) == (1, "")


def test_tracebacks_on_request_and_for_bugs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "a", "b"])
    monkeypatch.setenv("DSV3_TRACEBACK", "0")
    with pytest.raises(TypeError):
        run(raiser(TypeError("a bug")))
    monkeypatch.setenv("DSV3_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        run(raiser(RuntimeError("x")))


@pytest.mark.parametrize(
    ("devices", "before", "after"),
    [([], None, "cpu"), (["/dev/vfio/0"], None, None), (["/dev/nvidia0"], None, None),
     ([], "cuda", "cuda")],
)  # fmt: skip
def test_without_an_accelerator_jax_is_told_so(devices, before, after, monkeypatch, capsys):
    monkeypatch.setattr("glob.glob", lambda pattern: fnmatch.filter(devices, pattern))
    monkeypatch.delenv("JAX_PLATFORMS")
    if before is not None:
        monkeypatch.setenv("JAX_PLATFORMS", before)
    seen = []
    finish(lambda argv: seen.append(os.environ.get("JAX_PLATFORMS")), monkeypatch, capsys)
    assert seen == [after]


def test_one_line_parser_complains_without_usage():
    parser = OneLineParser()
    parser.add_argument("--top-p", type=float)
    with pytest.raises(ConfigError, match="--top-p: invalid float value: 'x'"):
        parser.parse_args(["--top-p", "x"])


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("train.py", ["configs/small.py", "--out=x", "--sed", "3"], "did you mean '--seed'?"),
        ("generate.py", ["runs/a"], "required: --prompt"),
    ],
)
def test_the_scripts_end_with_code_2_and_leave_nothing(script, argv, message, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *argv],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"configs"}


def test_a_reader_that_leaves_is_no_error(tmp_path):
    program = "from dsv3_jax.cli import run; run(lambda argv: print('x\\n' * 100000))"
    done = subprocess.run(
        f'{sys.executable} -c "{program}" | head -1',
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("x\n", "")
