"""Killed, interrupted, out of disk: the same command goes on, and the bytes are those of an uninterrupted run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import REPO, write_gguf

from ptqtp_gguf.conversion import loop as transcode
from ptqtp_gguf.conversion import output_files
from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.conversion.records import ConversionJournal
from ptqtp_gguf.errors import Interrupted, OutputError, ResumeError
from ptqtp_gguf.files.journal import Journal, journal_path
from ptqtp_gguf.plan.options import Options

N = 8


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator) -> Path:
    tensors = {f"blk.{i}.w.weight": (rng.normal(size=(64, 128)) * 0.05).astype(np.float32) for i in range(N)}
    tensors["blk.3.w.weight"][5, 5] = 20  # falls back
    return write_gguf(tmp_path / "source.gguf", tensors)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "b.gguf"


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> bytes:
    """What an uninterrupted run writes."""
    path = tmp_path / "whole.gguf"
    conversion.convert(source, path)
    return path.read_bytes()


def stop_after(n: int, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
    """The next conversion ends after n finished tensors, as by Ctrl-C or by a given error."""
    real = transcode._close_tensor

    def close(journal: Journal, *args: object) -> None:
        real(journal, *args)  # type: ignore[arg-type]
        if len(journal.rows) == n:
            raise error or KeyboardInterrupt

    monkeypatch.setattr(transcode, "_close_tensor", close)


@pytest.mark.parametrize("n", [1, 3, 4, N])
def test_goes_on_where_it_was(source: Path, out: Path, whole: bytes, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m, pytest.raises(Interrupted, match=f"{n} finished tensors are kept; run the same"):
        stop_after(n, m)
        conversion.convert(source, out)
    assert not out.exists() and len(list(out.parent.iterdir())) == 2
    summary = conversion.convert(source, out)
    assert summary.resumed == n
    assert out.read_bytes() == whole
    assert [p.name for p in out.parent.iterdir()] == ["b.gguf"]
    assert [r.choice.fallback for r in summary.rows] == [i == 3 for i in range(N)]
    assert all(r.rel_mse is not None for i, r in enumerate(summary.rows) if i != 3)


def test_options_that_do_not_decide_the_bytes_may_change(
    source: Path, out: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as m, pytest.raises(Interrupted):
        stop_after(2, m)
        conversion.convert(source, out, Options(threads=1))
    conversion.convert(source, out, Options(threads=2, max_memory=400 << 20))
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(type="TP2_0"), r"--type TP2_2 \(now TP2_0\)"),
        (Options(tensor_types=("blk.1=Q8_0",)), "another recipe"),
        (Options(overrides=("general.name=str:x",)), "--override-kv"),
        (Options(split_max_size=10**6), r"--split-max-size 0 \(now 1000000\)"),
    ],
)
def test_other_options_are_refused(
    source: Path, out: Path, whole: bytes, options: Options, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as m, pytest.raises(Interrupted):
        stop_after(2, m)
        conversion.convert(source, out)
    with pytest.raises(ResumeError, match=message) as e:
        conversion.convert(source, out, options)
    assert "--restart" in str(e.value)
    assert conversion.convert(source, out).resumed == 2  # the refusal has harmed nothing
    assert out.read_bytes() == whole


def test_restart_begins_anew(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m, pytest.raises(Interrupted):
        stop_after(2, m)
        conversion.convert(source, out)
    assert conversion.convert(source, out, Options(type="TP2_0", restart=True)).resumed == 0
    assert [p.name for p in out.parent.iterdir()] == ["b.gguf"]


def test_another_version_is_refused(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m, pytest.raises(Interrupted):
        stop_after(2, m)
        conversion.convert(source, out)
    monkeypatch.setattr("ptqtp_gguf.source.identity.__version__", "9.9")
    with pytest.raises(ResumeError, match=r"begun with ptqtp-gguf 0\.\d\.\d \(now 9\.9\)"):
        conversion.convert(source, out)


@pytest.mark.parametrize("what", ["weight done", "weight to do", "size", "metadata", "touched"])
def test_a_changed_source(
    source: Path, out: Path, rng: np.random.Generator, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as m, pytest.raises(Interrupted):
        stop_after(2, m)
        conversion.convert(source, out)
    data = bytearray(source.read_bytes())
    if what == "weight done":
        data[-(N - 1) * 64 * 128 * 4 - 8] ^= 1
    elif what == "weight to do":
        data[-8] ^= 1
    elif what == "metadata":
        data[data.index(b"tiny")] ^= 1
    source.write_bytes(bytes(data) + b"\0" * 32 * (what == "size"))
    if what in ("weight to do", "touched"):  # nothing of what is done depends on it
        assert conversion.convert(source, out).resumed == 2
        fresh = out.with_name("fresh.gguf")
        conversion.convert(source, fresh)
        assert out.read_bytes() == fresh.read_bytes()
    else:
        with pytest.raises(ResumeError, match=r"another source: .*source\.gguf has changed"):
            conversion.convert(source, out)


def test_lost_data_is_made_again(source: Path, out: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut the journal may have survived where the data has not."""
    for damage in (lambda p: os.truncate(p, p.stat().st_size - 5000), flip, Path.unlink):
        with monkeypatch.context() as m, pytest.raises(Interrupted):
            stop_after(6, m)
            conversion.convert(source, out)
        damage(out.with_name(".b.gguf.partial"))
        assert conversion.convert(source, out).resumed < 6
        assert out.read_bytes() == whole
        out.unlink()


def flip(path: Path) -> None:
    with open(path, "r+b") as f:
        f.seek(-3000, os.SEEK_END)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 0x10]))


def test_a_torn_journal(source: Path, out: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = journal_path(out)
    for tear, kept in ((lambda b: b[:-7], 4), (lambda b: b[: b.index(b"\n") // 2], 0), (lambda b: b"", 0)):
        with monkeypatch.context() as m, pytest.raises(Interrupted):
            stop_after(5, m)
            conversion.convert(source, out)
        journal.write_bytes(tear(journal.read_bytes()))
        assert conversion.convert(source, out).resumed == kept
        assert out.read_bytes() == whole
        out.unlink()


def test_a_damaged_journal_is_told(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal_path(out).write_text('{"job": {}}\n{"tensor": 7}\n')
    with pytest.raises(OutputError, match=r"damaged; .*--restart"):
        conversion.convert(source, out)
    conversion.convert(source, out, Options(restart=True))


@pytest.mark.parametrize("renamed", [False, True])
def test_killed_while_it_gets_its_name(
    source: Path, out: Path, whole: bytes, renamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = output_files.publish

    def publish(parts: list) -> None:
        if renamed:
            real(parts)
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(Interrupted):
        m.setattr(conversion, "publish", publish)
        conversion.convert(source, out)
    assert out.exists() == renamed
    assert conversion.convert(source, out).resumed == N
    assert out.read_bytes() == whole and [p.name for p in out.parent.iterdir()] == ["b.gguf"]


def test_a_verdict_of_other_files(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(parts: list) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(Interrupted):
        m.setattr(conversion, "publish", publish)
        conversion.convert(source, out)
    found = journal_path(out).read_text()
    for changed in (found + '{"verified":[]}\n', found.replace('{"tensor":5', '{"said":5')):
        journal_path(out).write_text(changed)
        with pytest.raises(OutputError, match=r"damaged; .*--restart"):
            conversion.convert(source, out)
    assert not out.exists()


def test_split_output_goes_on_too(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(split_max_size=12000)
    conversion.convert(source, out, options)
    expected = {p.name: p.read_bytes() for p in out.parent.iterdir()}
    assert len(expected) > 2
    for name in expected:
        (out.parent / name).unlink()
    for n in (1, 4, 6):
        with monkeypatch.context() as m, pytest.raises(Interrupted):
            stop_after(n, m)
            conversion.convert(source, out, options)
    assert conversion.convert(source, out, options).resumed == 6
    assert {p.name: p.read_bytes() for p in out.parent.iterdir()} == expected


@pytest.mark.slow
def test_one_conversion_to_a_target_at_a_time(
    cli: Callable[..., subprocess.CompletedProcess[str]], source: Path, out: Path
) -> None:
    with ConversionJournal(out):
        done = cli("convert", source, out)
    assert done.returncode == 1
    assert "another conversion to this file is running" in done.stderr and done.stderr.count("\n") == 1
    assert cli("convert", source, out).returncode == 0


@pytest.mark.slow
def test_disk_full(cli: Callable[..., subprocess.CompletedProcess[str]], source: Path, out: Path, whole: bytes) -> None:
    """A real limit: no file may grow beyond 20 kB, so a write fails halfway with EFBIG."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        f"sys.argv = ['x', 'convert', {str(source)!r}, {str(out)!r}];"
        "from ptqtp_gguf.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=out.parent
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "writing failed: File too large; " in done.stderr and "run the same command again" in done.stderr
    assert cli("convert", source, out).returncode == 0
    assert out.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_file_system(
    cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, rng: np.random.Generator
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        big = write_gguf(
            tmp_path / "big.gguf",
            {f"blk.{i}.w.weight": rng.normal(size=(256, 1024)).astype(np.float32) for i in range(8)},
        )
        done = cli("convert", big, disk / "b.gguf")
        assert done.returncode == 1 and "MB free on the disk" in done.stderr  # noticed before anything is written
        assert list(disk.iterdir()) == []
        # filled by somebody else in the middle: no early check can know
        code = (
            "import sys; from ptqtp_gguf.conversion import pipeline; pipeline.check_space = lambda *a: None;"
            f"sys.argv = ['x', 'convert', {str(big)!r}, {str(disk / 'b.gguf')!r}];"
            "from ptqtp_gguf.__main__ import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=disk
        )
        assert done.returncode == 1 and "No space left on device" in done.stderr and done.stderr.count("\n") == 1
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert cli("convert", big, disk / "b.gguf").returncode == 0
        assert cli("convert", big, tmp_path / "b.gguf").returncode == 0
        assert (disk / "b.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals(
    cli: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    out: Path,
    rng: np.random.Generator,
    signum: int,
) -> None:
    big = {f"blk.{i}.a.weight": rng.normal(size=(1024, 1024)).astype(np.float32) for i in range(6)}
    source = write_gguf(tmp_path / "big.gguf", big)
    options = ["-m", "paper", "-t", "TP2_0", "-j", "1"]  # the slowest
    command = [str(Path(sys.executable).with_name("ptqtp-gguf")), "convert", str(source), str(out), *options]
    # a job started in the background by a shell inherits an ignored SIGINT; the child must not
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and b'"tensor"' not in (
        journal_path(out).read_bytes() if journal_path(out).exists() else b""
    ):
        time.sleep(0.005)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished tensors are kept; run the same command again to resume" in err and "Traceback" not in err
    done = cli("convert", source, out, *options, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1])["resumed_tensors"] >= 1


@pytest.mark.slow
def test_random_kills(tmp_path: Path) -> None:
    """A short run of tools/stress/kill_test.py; docs/results/convert.md has the long one."""
    spec = importlib.util.spec_from_file_location("kill_test", REPO / "tools" / "stress" / "kill_test.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--points", "4", "--seed", "7", "-j", "1"]) == 0
