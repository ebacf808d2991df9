"""Disks that fail, fill up or give less than was asked, memory that ends, processes that are killed: what is left then.

docs/results/faults.md has the long runs of tools/stress/fault_test.py.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPO, safetensors_bytes, write_gguf

from ptqtp_gguf.calibrate.store import PlaneStore
from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.conversion.export import export_q4_0
from ptqtp_gguf.conversion.records import ConversionJournal
from ptqtp_gguf.errors import InputError, OutputError
from ptqtp_gguf.files import journal
from ptqtp_gguf.files import writing as output
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.files.journal import Journal, journal_path
from ptqtp_gguf.files.writing import check_target, partial_file, write_text
from ptqtp_gguf.plan.options import Options

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator) -> Path:
    tensors = {f"blk.{i}.w.weight": (rng.normal(size=(64, 128)) * 0.05).astype(np.float32) for i in range(3)}
    return write_gguf(tmp_path / "source.gguf", tensors)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "b.gguf"


def names(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir())


def fails(path_part: str, code: int = errno.EIO) -> Callable[..., object]:
    """A stand-in for Path.unlink on a disk that does not let go of some names."""
    real = Path.unlink

    def unlink(path: Path, *args: object, **kwargs: object) -> None:
        if path_part in path.name:
            raise OSError(code, os.strerror(code), str(path))
        real(path, *args, **kwargs)  # type: ignore[arg-type]

    return unlink


class Stingy(io.FileIO):
    """A file that reads and writes half of what it is asked for, as the system may; it fills up after `room` bytes."""

    room = 1 << 30

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and size >= 0
        return super().read(max(1, size // 2)) or b""

    def write(self, data: object) -> int:
        part = memoryview(data).cast("B")  # type: ignore[call-overload]
        if not Stingy.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = super().write(part[: min(Stingy.room, max(1, len(part) // 2))])
        Stingy.room -= n
        return n


# ---- the journal ----

RECORD = {"type": 0, "nbytes": 4, "hash": 1, "source": 2, "error": 0.0, "power": 1.0}


def test_a_journal_of_short_counts(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "open_locked", lambda path, _: Stingy(os.open(path, os.O_RDWR | os.O_CREAT), "r+"))
    with ConversionJournal(out) as j:
        j.append({"job": {"some": "thing" * 50}})
        for i in range(20):
            j.append(RECORD | {"tensor": i})
    with ConversionJournal(out) as j:
        assert j.found == 20
        j.cut(3)
    with ConversionJournal(out) as j:
        assert j.found == 3


def test_what_the_journal_could_not_take_is_not_counted(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "open_locked", lambda path, _: Stingy(os.open(path, os.O_RDWR | os.O_CREAT), "r+"))
    monkeypatch.setattr(Stingy, "room", 30)
    with pytest.raises(OSError), ConversionJournal(out) as j:
        j.append({"job": {}})
        assert j.job == {}
        j.append(RECORD | {"tensor": 0, "why": "a line that does not fit"})
    assert j.rows == []
    monkeypatch.setattr(Stingy, "room", 1 << 30)
    with ConversionJournal(out) as j:
        assert j.job == {} and j.found == 0


def test_the_first_error_is_told(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of cleaning up behind it."""
    os.truncate(source, source.stat().st_size - 5)
    monkeypatch.setattr(Path, "unlink", fails("journal"))
    with pytest.raises(InputError, match="truncated"):
        conversion.convert(source, out)


def test_a_disk_that_lets_go_of_nothing(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m, pytest.raises(OutputError, match=r"\.b\.gguf\.journal: Input/output error"):
        m.setattr(Path, "unlink", fails("journal"))
        conversion.convert(source, out)
    assert names(out) == [".b.gguf.journal", "b.gguf"]
    assert conversion.convert(source, out).resumed == 3
    assert names(out) == ["b.gguf"]


# ---- what else is written ----


def test_a_partial_file_of_a_killed_process(out: Path) -> None:
    left = out.with_name(".b.gguf.new")
    left.write_bytes(b"of one that was killed" * 100)
    write_text(out, "new")
    assert out.read_text() == "new" and names(out) == ["b.gguf"]
    assert out.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_one_writer_at_a_time(out: Path) -> None:
    with partial_file(out) as first:
        first.file.write(b"first")
        with pytest.raises(OutputError, match="another process is writing this file"), partial_file(out):
            pass
        first.sync()
        first.publish()
    assert out.read_bytes() == b"first" and names(out) == ["b.gguf"]


def test_a_full_disk_and_a_text(out: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device; nothing of it was left behind"), partial_file(out):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(out) == []


def test_an_export_does_not_replace_what_came_in_between(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = out.with_name("ours.gguf")
    conversion.convert(source, ours)
    real = output.check_space
    monkeypatch.setattr(output, "check_space", lambda *a: (real(*a), out.write_text("another's")))
    with pytest.raises(OutputError, match="exists already"):
        export_q4_0(ours, out)
    assert out.read_text() == "another's" and names(out) == ["b.gguf", "ours.gguf"]
    assert check_target  # the early look stays


def test_a_card_that_cannot_be_written(cli: Cli, source: Path, out: Path) -> None:
    card = out.with_name("README.md")
    card.mkdir()
    done = cli("convert", source, out, "-q", "--force", "--model-card", card)
    assert done.returncode == 1 and "README.md: writing failed: Is a directory" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    card.rmdir()
    shutil.copy(journal_path(out), out.with_name("note"))
    assert cli("convert", source, out, "-q", "--model-card", card).returncode == 0
    assert names(out) == ["README.md", "b.gguf", "note"]
    # killed behind the card: the very text is no reason to refuse, another is
    out.with_name("note").rename(journal_path(out))
    assert cli("convert", source, out, "-q", "--model-card", card).returncode == 0
    assert names(out) == ["README.md", "b.gguf"]
    with pytest.raises(OutputError, match=r"README\.md: exists already; use --force"):
        write_text(card, "another", force=False)


def test_planes_that_cannot_be_removed(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planes = out.with_name(".b.gguf.planes")
    planes.mkdir()
    (planes / "0.bin").write_bytes(b"x")
    with monkeypatch.context() as m, pytest.raises(OutputError, match="Input/output error"):
        real = os.unlink
        m.setattr(os, "unlink", lambda p, **k: _raise(p) if str(p).endswith("0.bin") else real(p, **k))
        conversion.convert(source, out)
    conversion.convert(source, out)
    assert names(out) == ["b.gguf"]


def _raise(path: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def test_killed_while_the_bf16_gets_its_name(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = out.parent.with_name("checkpoint")
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    (folder / "model.safetensors").write_bytes(safetensors_bytes({"x": tensor}, bytes(4)))
    bf16, options = out.with_name("bf16.gguf"), Options(keep_bf16=out.with_name("bf16.gguf"))

    def converter(_: object, work: Path) -> list[str]:  # llama.cpp's takes 10 s a run; here its file's name matters
        shutil.copy(source, work)
        return []

    monkeypatch.setattr("ptqtp_gguf.source.checkpoint.to_bf16_gguf", converter)
    real = Path.replace
    for renamed in (False, True):

        def replace(path: Path, target: Path, renamed: bool = renamed) -> None:
            if renamed:
                real(path, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as m, pytest.raises(conversion.Interrupted):
            m.setattr(Path, "replace", replace)
            conversion.convert(folder, out, options)
        assert bf16.exists() == renamed
        conversion.convert(folder, out, options)
        assert bf16.read_bytes() == source.read_bytes() and names(out) == ["b.gguf", "bf16.gguf"]
        out.unlink()
        with pytest.raises(OutputError, match=r"bf16\.gguf: exists already"):  # whose is it?
            conversion.convert(folder, out, options)
        bf16.unlink()

    # killed at the very end, between its note and the journal
    with monkeypatch.context() as m, pytest.raises(conversion.Interrupted):
        m.setattr(Journal, "remove", lambda j: _stop() if j.out == out else journal_path(j.out).unlink())
        conversion.convert(folder, out, options)
    assert names(out) == [".b.gguf.journal", "b.gguf", "bf16.gguf"]
    conversion.convert(folder, out, options)
    assert names(out) == ["b.gguf", "bf16.gguf"]


def _stop() -> None:
    raise KeyboardInterrupt


# ---- what is read ----


def test_a_file_that_is_cut_while_it_is_read(source: Path) -> None:
    """Of a mapping, the lost page would end the process by SIGBUS."""
    with Reader(source) as r:
        os.truncate(source, 100)
        with pytest.raises(InputError, match="has become shorter"):
            r.rows_f32(r.tensors[0])


def test_a_header_larger_than_the_first_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader(source) as r:
        expected = r.header
    monkeypatch.setattr("ptqtp_gguf.files.gguf.HEAD", 16)
    with Reader(source) as r:
        assert r.header == expected
    data = source.read_bytes()
    source.write_bytes(data[:200])
    with pytest.raises(InputError, match="does not fit into the file"):
        Reader(source)


def test_planes_that_are_cut(source: Path, out: Path) -> None:
    with Reader(source) as r, PlaneStore(out, {"options": {}}) as store:
        t = r.tensors[0]
        store.put(t, np.ones((64, 128), np.int8), np.zeros((64, 4), np.uint8))
        os.truncate(store.folder / "0.bin", 1000)
        with pytest.raises(OutputError, match=r"0\.bin: damaged; start over with --restart"):
            store.planes(t)
        os.truncate(store.folder / "0.bin", 0)
        with pytest.raises(OutputError, match=r"damaged; start over"):
            store.raw(t)


# ---- the command line ----


@pytest.mark.parametrize("command", ["convert SOURCE OUT --json", "inspect SOURCE --json"])
def test_a_full_standard_output(source: Path, out: Path, command: str) -> None:
    words = command.replace("SOURCE", str(source)).replace("OUT", str(out)).split()
    with open("/dev/full", "w") as full:
        script = Path(sys.executable).with_name("ptqtp-gguf")
        done = subprocess.run([script, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("Error: standard output"), done.stderr
    assert "No space left on device" in done.stderr and done.stderr.count("\n") == 1
    assert names(out) == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
@pytest.mark.parametrize("limit", [60, 150])
def test_no_memory_to_begin_with(tmp_path: Path, limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ptqtp_gguf", "inspect", "x.gguf"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit << 20, limit << 20)),
        cwd=tmp_path,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: "), done.stderr


# ---- the harness ----


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPO / "tools" / "stress")
    import fault_base

    return fault_base


def test_the_harness_sees_what_is_wrong(base: Any, tmp_path: Path) -> None:
    folder = tmp_path / "w" / "out"
    folder.mkdir(parents=True)
    (folder / "a.gguf").write_text("half")
    case = base.Case("x", [], new={"a.gguf": "1"}, old={"a.gguf": "2"})
    fault = base.Fault("write", 1, errno.ENOSPC)

    def of(code: int, err: str, fault: Any = fault) -> str:
        outcome = base.Outcome(code, "", err)
        return "; ".join(base.complaints(case, folder, outcome, fault, tmp_path / "w"))

    good = f"Error: {folder}/a.gguf: writing failed: No space left on device\n"
    assert of(1, good) == "a.gguf is neither the old nor the new file"
    (folder / "a.gguf").unlink()
    assert of(1, good) == "the old a.gguf is lost"
    case.old = {}
    assert of(1, good) == ""
    assert "names no file" in of(1, "Error: No space left on device\n")
    assert "does not say" in of(1, f"Error: {folder}: failed\n")
    assert "2 lines" in of(1, good + "more\n")
    assert "a traceback" in of(1, "Traceback (most recent call last):\nOSError\n")
    assert "exit code -7" in of(-7, "")
    assert "was not survived" in of(1, good, base.Fault("write", 1, base.SHORT))
    assert "other bytes" in of(0, "")
    (folder / "tmpx").write_text("")
    assert "tmpx lies there" in of(1, good)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="the layer is for Linux, made by cc")
def test_random_faults() -> None:
    """A short run of tools/stress/fault_test.py."""
    command = [sys.executable, str(REPO / "tools" / "stress" / "fault_test.py")]
    command += "--points 10 --limits 2 --pairs 1 --seed 11 --cases resume,split,card,export".split()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "13 points, 0 failures" in done.stdout


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="the layer is for Linux, made by cc")
@pytest.mark.runtime
def test_a_killed_server_leaves_nothing(base: Any) -> None:
    """tools/stress/fault_test.py's server; and its look at processes sees one that is left."""
    import fault_serve

    with subprocess.Popen(["sleep", "60"], env={fault_serve.MARK: "left"}) as left:
        assert fault_serve.wait_until(lambda: fault_serve.alive("left") == ["sleep 60 "], 5)
        left.kill()
    assert fault_serve.wait_until(lambda: not fault_serve.alive("left"), 5)
    command = [sys.executable, str(REPO / "tools" / "stress" / "fault_test.py")]
    command += "--points 3 --limits 0 --pairs 0 --seed 2 --cases serve --actions KILL,TORN".split()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 points, 0 failures" in done.stdout
