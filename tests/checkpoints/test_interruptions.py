"""Conversions that a full disk, a changed source or a kill interrupts."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dsv3_jax.checkpoints import staging
from dsv3_jax.checkpoints import to_hf as to_hf_module
from dsv3_jax.checkpoints.from_hf import from_hf
from dsv3_jax.checkpoints.to_hf import to_hf
from dsv3_jax.config import ConfigError
from tests.checkpoints.conftest import digest

ROOT = Path(__file__).resolve().parents[2]


def test_an_interrupted_export_continues(bf16, tmp_path, monkeypatch):
    to_hf(bf16().folder, tmp_path / "whole", max_shard_size="100KB")
    monkeypatch.setattr(staging, "_BYTES_A_COMMIT", 1)
    written = []
    original = to_hf_module._Export._write_tensor

    def fail_later(self, item, *rest):
        written.append(item.name)
        if len(written) == 60:
            raise OSError(5, "Input/output error")
        original(self, item, *rest)

    monkeypatch.setattr(to_hf_module._Export, "_write_tensor", fail_later)
    with pytest.raises(OSError, match="Input/output"):
        to_hf(bf16().folder, tmp_path / "parts", max_shard_size="100KB")
    assert not (tmp_path / "parts").exists()
    with pytest.raises(ConfigError, match="another --max-shard-size: delete it to start again"):
        to_hf(bf16().folder, tmp_path / "parts", max_shard_size="90KB")
    first, written[:] = list(written), ["more"] * 100
    to_hf(bf16().folder, tmp_path / "parts", max_shard_size="100KB")
    assert len(set(first) & set(written)) < 10  # only what was under way is done again
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_the_work_goes_on_later(fp8, convert, tmp_path, monkeypatch):
    from_hf(fp8.folder, tmp_path / "whole")
    monkeypatch.setattr(staging, "_BYTES_A_COMMIT", 1)
    calls, write = [], os.pwrite

    def fill(descriptor, data, offset):
        calls.append(len(data))
        if len(calls) > 600:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: max(1, len(data) // 2)], offset)  # short, as a disk fills

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fill)
        code, (line,) = convert("from-hf", fp8.folder, tmp_path / "ours")
    assert code == 2 and "No space left on device at tensor 'model." in line
    assert str(fp8.folder / "model-0") in line and f"{tmp_path / 'ours'}.partial" in line
    journal = (tmp_path / "ours.partial" / "journal.jsonl").read_text().splitlines()
    assert len(journal) > 3
    code, (line,) = convert("from-hf", fp8.folder, tmp_path / "ours", "--dtype", "float32")
    assert code == 2 and "with another --dtype: delete it to start again" in line
    assert convert("from-hf", fp8.folder, tmp_path / "ours")[0] == 0
    assert digest(tmp_path / "ours") == digest(tmp_path / "whole")


def test_a_source_that_changed_is_not_continued(bf16, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(bf16().folder, source)
    monkeypatch.setattr(staging.Staging, "publish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        from_hf(source, tmp_path / "ours")
    monkeypatch.undo()
    shard = source / "model-00001-of-00003.safetensors"
    os.utime(shard, (1, 1))
    with pytest.raises(ConfigError, match=r"another source: delete it to start again"):
        from_hf(source, tmp_path / "ours")
    first = staging.Staging(tmp_path / "other", {"a": 1})
    with pytest.raises(ConfigError, match="another process is writing"):
        staging.Staging(tmp_path / "other", {"a": 1})
    first.close()


KILLED = """
    import os, random, signal, sys
    from pathlib import Path
    import dsv3_jax.checkpoints.staging as staging
    from dsv3_jax.checkpoints.from_hf import from_hf
    from dsv3_jax.checkpoints.to_hf import to_hf

    staging._BYTES_A_COMMIT = 20_000
    source, work = map(Path, sys.argv[1:])
    kinds = {"pwrite": os.pwrite, "write": os.write, "fsync": os.fsync, "rename": os.rename,
             "unlink": os.unlink, "rmdir": os.rmdir}

    def attempt(convert, fatal):
        # Whether it ended by itself, and not by the kill before event `fatal`.
        child = os.fork()
        if child:
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL), status
            return status == 0
        try:
            events = 0
            for name, call in kinds.items():
                def counted(*args, call=call, name=name, **kw):
                    nonlocal events
                    events += 1
                    if fatal in (events, name):
                        if name == "pwrite":  # half of it is written
                            call(args[0], args[1][: len(args[1]) // 2], *args[2:])
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*args, **kw)
                setattr(os, name, counted)
            convert()
            Path(work, "events").write_text(str(events))
            os._exit(0)
        finally:
            os._exit(1)

    rng = random.Random(0)
    for name, convert in {
        "ours": lambda at: from_hf(source, at),
        "back": lambda at: to_hf(work / "ours", at, fp8=True, max_shard_size="300KB"),
    }.items():
        assert attempt(lambda: convert(work / f"whole_{name}"), None)
        events = int(Path(work, "events").read_text())
        moments = [rng.randint(1, int(events * 0.45)) for _ in range(2)]
        if name == "ours":  # and in the act of publishing and of tidying up
            moments += ["rename", "unlink", "rmdir"]
        for fatal in moments:
            assert not attempt(lambda: convert(work / name), fatal), fatal
        assert attempt(lambda: convert(work / name), None)
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again_it_ends_identical(fp8, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(fp8.folder), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("ours", "back"):
        assert digest(tmp_path / name) == digest(tmp_path / f"whole_{name}")
        assert not (tmp_path / f"{name}.partial").exists()
