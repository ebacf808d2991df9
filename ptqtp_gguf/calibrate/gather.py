"""Calibration text through the model by the runtime: the second moments of what each matrix is given.

Any GGUF that llama.cpp runs, of any architecture; torch has no part in it. The work is done by a process of its own
(_gather_child.py), which can be killed and goes on with its last checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path
from threading import Thread
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .. import errors
from ..errors import CalibrationError, OutputError
from ..files import Reader, TensorInfo, write_text
from ..progress import Progress, no_progress
from .moments import read_index, require_key

# not -m, which would take a package in the current folder for ours
CHILD = "import sys; sys.path.insert(0, sys.argv.pop(1)); from ptqtp_gguf.calibrate._gather_child import main; main()"
ENVIRONMENT = {  # threads that wait sleep: BLAS and the runtime take turns
    "OMP_WAIT_POLICY": "passive",
    "OPENBLAS_THREAD_TIMEOUT": "4",
    "GGML_NO_BACKTRACE": "1",
}
SAMPLE = 1 << 12  # bytes of each tensor that stand for it
BATCH = 1024  # tokens that are computed together, at most
SCORES = 1 << 22  # of attention in one head, at most: a batch of tokens times a window


def key_of(model: str, tokens: NDArray[np.int64], wanted: dict[str, TensorInfo]) -> dict[str, Any]:
    """What decides the moments. model: what identifies the source."""
    text = hashlib.sha256(np.ascontiguousarray(tokens, "<i8").data).hexdigest()
    names = hashlib.sha256("\n".join(sorted(wanted)).encode()).hexdigest()
    return {"model": model, "tokens": text, "shape": list(tokens.shape), "tensors": names}


def gather(
    model: Path,
    tokens: NDArray[np.int64],
    wanted: dict[str, TensorInfo],
    folder: Path,
    key: dict[str, Any],
    *,
    threads: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Leave complete moments in a folder, unless they are there.

    model   a GGUF file, of a split one the first part
    tokens  int64 (N, T): N windows of T tokens, each on its own
    wanted  matrices by name; output.weight means the output matrix, tied or not
    key     of `key_of`
    Raises CalibrationError where the model cannot be run or the folder holds other moments, OutputError.
    """
    try:
        folder.mkdir(exist_ok=True)
        index = read_index(folder)
        if index is None and any(p.name not in ("job.json", "tokens") for p in folder.iterdir()):
            raise CalibrationError(f"{folder}: holds other files and no index.json; name a new folder")
        if index is not None:
            require_key(folder, index, key)
            if index.complete:
                return
        kept = folder / "tokens"
        np.ascontiguousarray(tokens, "<i8").tofile(kept)
        job = {
            "model": str(model),
            "tokens": str(kept),
            "window": tokens.shape[1],
            "batch": min(BATCH, tokens.shape[1], max(1, SCORES // tokens.shape[1])),
            "folder": str(folder),
            "key": key,
            "threads": threads,
            "wanted": {n: t.shape[2] if len(t.shape) > 2 else 0 for n, t in wanted.items()},
        }
        write_text(folder / "job.json", json.dumps(job))
        _run(folder / "job.json", model, threads, "calibrating", "windows of text", progress)
        for path in (kept, folder / "job.json"):
            path.unlink()
    except OSError as e:
        raise OutputError(f"{e.filename or folder}: {e.strerror or e}; run again to resume") from None


def probe(
    model: Path, tokens: NDArray[np.int64], names: list[str], folder: Path, threads: int, progress: Progress
) -> dict[str, float]:
    """What an error in each matrix does to the output, by name (probing.py). folder: exists, for the job's file.

    Raises CalibrationError where the model cannot be run, OutputError.
    """
    job = folder / "probe.json"
    try:
        write_text(job, json.dumps(dict(model=str(model), tokens=tokens.tolist(), names=names, threads=threads)))
        said = _run(job, model, threads, "weighing matrices", "groups of matrices", progress)
        job.unlink()
    except OSError as e:
        raise OutputError(f"{e.filename or folder}: {e.strerror or e}; run again to resume") from None
    return {str(k): float(v) for k, v in said.get("worth", {}).items()}


def _run(job: Path, model: Path, threads: int, stage: str, what: str, progress: Progress) -> dict[str, Any]:
    """The last that the child says. Raises CalibrationError, and what it raises."""
    env = {**os.environ, **ENVIRONMENT}
    if threads:
        env |= {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    line = [sys.executable, "-u", "-c", CHILD, str(Path(__file__).parents[2]), str(job)]
    said: dict[str, Any] = {}
    pipe = subprocess.PIPE  # the child ends when its standard input does, so with this process
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env) as child:
        assert child.stdout and child.stderr
        last: deque[str] = deque(maxlen=20)
        drain = Thread(target=_drain, args=(child.stderr, last), daemon=True)
        drain.start()
        try:
            progress(stage, 0, 0, what)
            for text in child.stdout:
                said = json.loads(text) if text.startswith("{") else {}
                if "error" in said:
                    raise getattr(errors, str(said["kind"]), CalibrationError)(said["error"])
                if "done" in said:
                    progress(stage, said["done"], said["of"], what)
        except BaseException:
            child.kill()
            raise
        finally:
            child.wait()
            drain.join()
    if child.returncode:
        why = next((t for t in reversed(last) if t.strip()), f"exit code {child.returncode}")
        raise CalibrationError(f"{model}: the runtime died while text ran through the model: {why.strip()}")
    return said


def _drain(pipe: IO[str], last: deque[str]) -> None:
    with contextlib.suppress(ValueError):
        last.extend(pipe)


def identity_of(model: Path) -> str:
    """What tells a GGUF file's model from another: its header, and the beginning of each tensor."""
    with Reader(model) as reader:
        sha = hashlib.sha256()
        for t in reader.tensors:
            sha.update(json.dumps([t.name, t.shape, t.type]).encode())
            if t.nbytes:
                sha.update(next(reader.chunks(t, min(SAMPLE, t.nbytes))).data)
        return sha.hexdigest()
