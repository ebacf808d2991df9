"""Several ranks: the bytes of one process, whoever dies on the way; started by torchrun, or by hand as it would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import write_gguf

from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.conversion import shares
from ptqtp_gguf.conversion.loop import Job
from ptqtp_gguf.conversion.records import JobRecord
from ptqtp_gguf.distributed import run as distributed
from ptqtp_gguf.errors import Interrupted, QuantizeError
from ptqtp_gguf.files.journal import Journal, journal_path
from ptqtp_gguf.plan.options import Calibration, Options

pytest.importorskip("torch.distributed")

SPLIT = 300_000
SLOW = ["-m", "paper", "-t", "TP2_0"]
OPTIONS = {"one": Options(), "split": Options(split_max_size=SPLIT)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 tensors of different sizes, one falls back; an embedding and an output, which become stock types."""
    rng = np.random.default_rng(5)
    tensors = {
        f"blk.{i}.w.weight": (rng.normal(size=(64 + 64 * (i % 5), 1024)) * 0.05).astype(np.float32) for i in range(20)
    }
    tensors["blk.7.w.weight"][3, 5] = 50
    tensors |= {
        n: (rng.normal(size=(96, 1024)) * 0.05).astype(np.float32) for n in ("token_embd.weight", "output.weight")
    }
    return write_gguf(tmp_path_factory.mktemp("source") / "s.gguf", tensors)


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some seconds of work by the slowest method."""
    rng = np.random.default_rng(6)
    tensors = {f"blk.{i}.w.weight": rng.normal(size=(512, 1024)).astype(np.float32) for i in range(24)}
    return write_gguf(tmp_path_factory.mktemp("slow") / "s.gguf", tensors)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "m.gguf"


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def expected(source: Path, tmp_path: Path, options: Options) -> dict[str, bytes]:
    """What one process writes."""
    folder = tmp_path / "expected"
    folder.mkdir()
    conversion.convert(source, folder / "m.gguf", options)
    return files(folder)


def torchrun(n: int, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "-m", "ptqtp_gguf", "convert"]
    return subprocess.Popen(
        [*command, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=sys.prefix
    )  # not in the repository: -m would find the package without its library there


def by_hand(*commands: list[object], **env: str) -> list[subprocess.Popen[str]]:
    """One process a command, as ranks of one world, with nobody who watches them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "ptqtp_gguf", "convert", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=sys.prefix,
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, command in enumerate(commands)
    ]


def finished(folder: Path) -> int:
    """Tensors that the journals of shares call finished."""
    return sum(p.read_bytes().count(b'"tensor"') for p in folder.glob(".m-*.journal"))


def wait_for(folder: Path, n: int) -> None:
    deadline = time.monotonic() + 120
    while finished(folder) < n:
        assert time.monotonic() < deadline, sorted(p.name for p in folder.iterdir())
        time.sleep(0.01)


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    return stdout, stderr


@pytest.mark.slow
def test_torchrun_gives_the_bytes_of_one_process(source: Path, out: Path, tmp_path: Path) -> None:
    stdout, _ = ended(torchrun(3, source, out, "--json"))
    events = [json.loads(line) for line in stdout.splitlines()]
    assert [e["event"] for e in events].count("done") == 1 and events[-1]["resumed_tensors"] == 0
    assert {"quantizing", "verifying"} <= {e["stage"] for e in events[:-1]}
    assert all(0 <= e["done"] <= e["total"] for e in events[:-1])
    assert files(out.parent) == expected(source, tmp_path, Options())


@pytest.mark.slow
def test_a_rank_of_torchrun_is_killed_and_two_go_on(slow_source: Path, out: Path, tmp_path: Path) -> None:
    limit = 1_200_000
    args = [slow_source, out, *SLOW, "-j", "1", "--split-max-size", limit]
    process = torchrun(3, *args)
    wait_for(out.parent, 3)
    pids = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    victim = next(int(p) for p in pids if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{p}/environ").read_bytes())
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    for rank in (0, 2):
        lines = [line for line in err.splitlines() if line.startswith(f"Error: rank {rank} of 3")]
        assert len(lines) == 1 and "is kept; run the same command again to resume" in lines[0], err
    done = finished(out.parent)
    assert done >= 3 and not list(out.parent.glob("m*"))
    first, second = by_hand([*args, "--json"], args)
    stdout, _ = ended(first)
    assert json.loads(stdout.splitlines()[-1])["resumed_tensors"] == done
    assert ended(second) == ("", "")
    options = Options(method="paper", type="TP2_0", split_max_size=limit)
    assert files(out.parent) == expected(slow_source, tmp_path, options)


@pytest.mark.slow
def test_alone_then_two_then_alone(
    slow_source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is stopped, ranks go on, one dies with nobody there to see it; one process ends it. A single file."""
    options = Options(method="paper", type="TP2_0")
    stop_alone(slow_source, out, options, 4, monkeypatch)
    args = [slow_source, out, *SLOW, "-j", "1"]
    first, second = by_hand(args, args, PTQTP_RANK_SILENCE="3")
    wait_for(out.parent, 3)
    second.kill()
    second.communicate()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 1 and err.count("\n") == 1, err
    assert "rank 0 of 2" in err and "nothing was heard of rank 1 of 2" in err
    done = finished(out.parent)
    assert done < 20 and conversion.convert(slow_source, out, options).resumed == 4 + done
    assert files(out.parent) == expected(slow_source, tmp_path, options)


def stop_alone(source: Path, out: Path, options: Options, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion by one process ends after n tensors."""
    append = Journal.append

    def appended(journal: Journal, record: dict[str, object]) -> None:
        append(journal, record)
        if len(journal.rows) == n:
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(Interrupted, match=f"{n} finished tensors are kept"):
        m.setattr(Journal, "append", appended)
        conversion.convert(source, out, options)


def test_ranks_go_on_with_parts_of_one_process(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(split_max_size=SPLIT)
    stop_alone(source, out, options, 9, monkeypatch)
    args = [source, out, "--split-max-size", SPLIT]
    first, second = by_hand([*args, "--json"], args)
    assert json.loads(ended(first)[0].splitlines()[-1])["resumed_tensors"] == 9
    ended(second)
    assert files(out.parent) == expected(source, tmp_path, options)


def test_what_differs_among_ranks_is_refused(source: Path, out: Path) -> None:
    for rank, process in enumerate(by_hand([source, out], [source, out, "--type", "TP2_0"])):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and err.startswith(f"Error: rank {rank} of 2"), err
        assert "rank 1 of 2" in err and "another --type: TP2_0, and TP2_2 on rank 0" in err and err.count("\n") == 1
    assert files(out.parent) == {}


@pytest.mark.hf
@pytest.mark.runtime
def test_a_checkpoint_that_only_the_first_rank_sees(tiny_checkpoint: Path, out: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "absent"
    first, second = by_hand([tiny_checkpoint, out], [nowhere, out])
    _, err = second.communicate(timeout=60)
    assert f"{nowhere}: this rank does not see it" in err and "--keep-bf16" in err and err.count("\n") == 1
    _, err = first.communicate(timeout=60)
    assert first.returncode == 1 and "ended, because rank 1 of 2" in err and err.count("\n") == 1, err
    assert files(out.parent) == {}
    bf16 = tmp_path / "bf16.gguf"
    first, second = by_hand(*([p, out, "--keep-bf16", bf16] for p in (tiny_checkpoint, nowhere)))
    ended(first)
    ended(second)
    assert files(out.parent) == expected(bf16, tmp_path, Options())  # as from the checkpoint, without its converter
    assert not journal_path(bf16).exists()


def test_calibration_does_not_divide(source: Path, out: Path) -> None:
    with pytest.raises(QuantizeError, match=r"--calib and --hessians do not divide .* --imatrix"):
        distributed.convert_on_ranks(source, out, Options(calibration=Calibration(texts=("builtin",))))


@pytest.mark.parametrize("damage", ["cut", "foreign", "lost"])
@pytest.mark.parametrize("kind", ["one", "split"])
def test_shares_that_are_not_what_they_say(
    source: Path, out: Path, tmp_path: Path, kind: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process after ranks; without torch. A share is damaged, another output's, or gone."""
    whole = expected(source, tmp_path, OPTIONS[kind])
    leave_shares(source, out, OPTIONS[kind], monkeypatch)
    journals = sorted(out.parent.glob(".m-*.journal"))
    assert len(journals) > 3
    data = journals[2].with_suffix(".partial")
    if damage == "cut":
        os.truncate(data, data.stat().st_size - 3000)
    elif damage == "lost":
        data.unlink()
    else:
        journals[2].write_bytes(journals[2].read_bytes().replace(b'"of":"', b'"of":"x'))
    summary = conversion.convert(source, out, OPTIONS[kind])
    assert files(out.parent) == whole
    assert summary.resumed and [r.choice.fallback for r in summary.rows] == [i == 7 for i in range(22)]


def leave_shares(source: Path, out: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of ranks that were stopped: every third share is not begun."""

    def stop(job: Job) -> None:
        main = job.journal.job
        assert main is not None
        of = JobRecord.read(main).token()
        for i, share in enumerate(shares.shares_of(out, job.source, main["plan"], job.parts)):
            if i % 3 == 0:
                continue
            with shares.opened(share, of) as journal:
                rows = job.rows[share.first : share.end]
                mine = Job(job.source, rows, [share.part], journal, job.encoder, job.method, job.piece, 1, job.progress)
                shares.work(mine, out, False, check=len(job.parts) > 1 and i > 0)
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(Interrupted, match="what several processes have finished is kept"):
        m.setattr(conversion, "transcode", stop)
        conversion.convert(source, out, options)
