#!/usr/bin/env python3
"""Let system calls of our commands fail, one after the other, and look at what is left.

    fault_test.py [--points 200] [--seed 1] [--cases gguf,split,...] [--seconds 0] [--only "CASE OP K ACTION ..."]

Calls: each case is run once undisturbed, its system calls on files are counted, and points are chosen at random, half
of them among all calls, half so that rare kinds of calls and files come up too. At each point the command runs in a
fresh folder and that call fails in a way that it can on a real machine: EIO, no space, quota, rights, short counts,
EINTR, too many files, SIGBUS behind a mapping, another time of day, SIGKILL before, behind or in the middle of
the call; for a share of the points the disk stays full or dead from there on. Threads and child processes count too.
A server is killed at random moments besides. Limits: RLIMIT_AS, RLIMIT_FSIZE and RLIMIT_NOFILE at random values.
Pairs: two processes to one target.

Each time: exit code 0, or 1 and one line that names a file and says what happened; no target, the old one, or the whole
new one; then the same command undisturbed ends with the very bytes of the undisturbed run and nothing else in its
folder. Exits 1 if anything is otherwise.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fault_base as base
from fault_base import ACTIONS, BUS, CLOCK, KILL, LASTING, OPS, SHORT, Case, Fault, Layer, Outcome
from fault_serve import Serving, talking

SMALL = "gguf force resume split card verify export".split()
LARGE = "checkpoint bf16 calib calib-resume hessians".split()  # seconds a run: torch, transformers
SERVE = "serve"  # a second a run; see fault_serve.py
JUMPS = (-20 * 365 * 86400, -3600, 3600, 20 * 365 * 86400)


class Bench:
    """The sources, the cases, and one run after the other."""

    def __init__(self, work: Path, names: list[str]) -> None:
        import ptqtp_gguf.commands.app  # noqa: F401  # before the forks

        self.layer = Layer(work)
        self.source, self.folder = self.layer.watched / "src", self.layer.watched / "out"
        self.source.mkdir()
        self.failures: list[str] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        gguf = model(self.source / "model.gguf")
        ours = self.source / "ours.gguf"
        self._good(["convert", str(gguf), str(ours), "-q"])
        if set(names) & set(LARGE):
            checkpoint(self.source / "checkpoint")
            import torch  # noqa: F401  # once, not in every fork
            import transformers  # noqa: F401
        shutil.copy(base.HERE.parent / "fixtures" / "sample.txt", self.source / "text.txt")
        self.serving = Serving(self.layer, talking(self.source / "talking.gguf")) if SERVE in names else None
        self.cases = [self._case(n, gguf, ours, self.source / "checkpoint") for n in names]

    def _good(self, args: list[str]) -> Outcome:
        done = self.layer.run(args, log=True)
        if done.code:
            raise SystemExit(f"fault_test: an undisturbed run failed: {' '.join(args)}: {done.err}")
        return done

    def _case(self, name: str, gguf: Path, ours: Path, folder: Path) -> Case:
        if name == SERVE:
            return self._serve_case()
        out = self.folder / "out.gguf"
        text = ["--calib", str(self.source / "text.txt"), "--calib-tokens", "256", "--calib-window", "64"]
        calib = ["convert", str(folder), str(out), "-q", *text, "--no-fisher"]
        plain = ["convert", str(gguf), str(out), "-q"]
        args = {
            "gguf": plain,
            "force": [*plain, "--force"],
            "resume": plain,
            "split": [*plain, "--split-max-size", "12000"],
            "card": [*plain, "--model-card", str(self.folder / "README.md")],
            "verify": ["verify", str(ours), "--against", str(gguf), "-q"],
            "export": ["export-q4_0", str(ours), str(out), "-q"],
            "checkpoint": ["convert", str(folder), str(out), "-q"],
            "bf16": ["convert", str(folder), str(out), "-q", "--keep-bf16", str(self.folder / "bf16.gguf")],
            "calib": calib,
            "calib-resume": calib,
            "hessians": [*calib[:-1], "--hessians", str(self.folder / "moments")],
        }[name]
        case = Case(name, args)
        case.fresh(self.folder)
        if name == "force":
            out.write_bytes(b"what lay there before" * 1000)
            self._keep(case)
            case.old = base.digests(self.folder)
        if name.endswith("resume"):  # killed in the middle
            wanted = ".partial" if name == "resume" else ".bin"
            calls = [op for op, path in self._good(args).calls if op == "write" and wanted in path]
            before = [op for op, path in self._good([*args, "--force"]).calls if op == "write"]
            case.fresh(self.folder)
            self.layer.run(args, Fault("write", max(1, len(before) - len(calls) // 2), KILL))
            self._keep(case)
        case.calls = self._good(args).calls
        case.new = base.digests(self.folder)
        return case

    def _serve_case(self) -> Case:
        assert self.serving is not None
        case = Case(SERVE, [])
        case.fresh(self.folder)
        done, wrong = self.serving.run(self.folder, log=True)
        if wrong:
            raise SystemExit(f"fault_test: an undisturbed server: {'; '.join(wrong)}: {done.err}")
        case.calls = done.calls
        return case

    def _keep(self, case: Case) -> None:
        case.before = self.layer.work / f"before-{case.name}"
        shutil.copytree(self.folder, case.before)

    # ---- one point ----

    def point(self, case: Case, fault: Fault | None, limits: dict[int, int] | None = None, label: str = "") -> None:
        case.fresh(self.folder)
        done = self.layer.run(case.args, fault, limits=limits, fork=resource.RLIMIT_AS not in (limits or {}))
        wrong = list(base.complaints(case, self.folder, done, fault, self.layer.watched))
        killed = done.code < 0
        end = "killed" if killed else f"exit {done.code}"
        self.counts[case.name, "not reached" if fault and not done.hit else end] += 1
        complete = base.digests(self.folder) == case.new
        if done.code and not (complete and (killed or not case.new)):
            again = self.layer.run(case.args)
            if again.code or again.err:
                wrong.append(f"the next run: exit code {again.code}: {again.err.strip()[-300:]}")
            elif (found := base.digests(self.folder)) != case.new:
                same = {n for n in found if found[n] == case.new.get(n)}
                wrong.append(f"after the next run: {sorted(found)}, as they should be: {sorted(same)}")
        if wrong:
            what = label or f"{fault}" + (f", first at {done.hit}" if done.hit else "")
            only = f"\n    --only '{case.name} {fault.spec()}'" if fault else ""
            self.fail(f"{case.name}: {what}: {'; '.join(wrong)}{only}\n    stderr: {done.err.strip()[-1200:]}")

    def serve_point(self, case: Case, fault: Fault | None, kill_after: float | None = None) -> None:
        """A server, with one call failing, or killed after so many seconds."""
        assert self.serving is not None
        case.fresh(self.folder)
        done, wrong = self.serving.run(self.folder, fault, kill_after)
        end = "killed" if done.code < 0 else f"exit {done.code}"
        self.counts[case.name, "not reached" if fault and not done.hit else end] += 1
        if wrong:
            what = f"{fault}, first at {done.hit}" if fault else f"killed after {kill_after:.3f} s"
            only = f"\n    --only '{case.name} {fault.spec()}'" if fault else ""
            self.fail(f"{case.name}: {what}: {'; '.join(wrong)}{only}\n    stderr: {done.err.strip()[-1200:]}")

    def fail(self, text: str) -> None:
        self.failures.append(text)
        print(f"FAILED {text}", flush=True)

    def has_points(self, case: Case, only: set[int]) -> bool:
        """Whether any of these actions can happen to it: a full disk cannot to what writes nothing."""
        return not only or CLOCK in only or any(only & set(ACTIONS[op]) for op, _ in case.calls)

    def choose(self, case: Case, rng: random.Random, only: set[int]) -> Fault:
        """A point among the calls of the undisturbed run. only: actions, empty = all."""
        numbered, seen = [], Counter[str]()
        for op, path in case.calls:
            seen[op] += 1
            if not only or CLOCK in only or only & set(ACTIONS[op]):
                numbered.append((op, seen[op], re.sub(r"\d+", "#", path)))
        often = [a for a in (SHORT, errno.EINTR) if not only or a in only]
        if often and rng.random() < 0.06:
            return Fault(action=rng.choice(often), lasting=("read", "write"), p=0.3, seed=rng.randrange(1 << 30))
        if rng.random() < 0.5:
            kind = rng.choice(sorted({(op, path) for op, _, path in numbered}))
            numbered = [n for n in numbered if (n[0], n[2]) == kind]
        op, k, _ = rng.choice(numbered)
        actions = [a for a in ACTIONS[op] if not only or a in only]
        if not actions or ((not only or CLOCK in only) and rng.random() < 0.04):
            return Fault(op, k, CLOCK, jump=rng.choice(JUMPS))
        action = rng.choice(actions)
        if action == BUS and case.name.startswith(("calib", "hessians")):
            action = errno.ENOMEM  # torch and safetensors map the shards in this process; nobody can catch that
        lasting = tuple(LASTING[action]) if action in LASTING and rng.random() < 0.35 else ()
        return Fault(op, k, action, lasting)

    # ---- limits, pairs ----

    def limit(self, case: Case, rng: random.Random) -> None:
        size = max(p.stat().st_size for p in self.source.iterdir() if p.is_file())
        what, value = rng.choice(
            [
                (resource.RLIMIT_FSIZE, rng.randrange(size)),
                (resource.RLIMIT_NOFILE, rng.randrange(5, 24)),
                (resource.RLIMIT_AS, rng.randrange(150, 400 if case.name in SMALL else 4000) << 20),
            ]
        )
        name = {resource.RLIMIT_FSIZE: "FSIZE", resource.RLIMIT_NOFILE: "NOFILE", resource.RLIMIT_AS: "AS"}[what]
        self.point(case, None, {what: value}, f"RLIMIT_{name} {value}")

    def pair(self, case: Case, rng: random.Random) -> None:
        """Two at once: one does it, the other does it too or refuses in a line."""
        case.fresh(self.folder)
        script = str(Path(sys.executable).with_name("ptqtp-gguf"))
        running = []
        for _ in range(2):
            running.append(subprocess.Popen([script, *case.args], stderr=subprocess.PIPE, text=True))
            time.sleep(rng.uniform(0, 0.4))
        ends = [(p.returncode, err) for p in running for err in [p.communicate()[1]]]
        refused = [err for code, err in ends if code == 1 and err.count("\n") == 1 and err.startswith("Error: ")]
        self.counts[case.name, f"pair, {len(refused)} refused"] += 1
        if sum(code == 0 for code, _ in ends) + len(refused) != 2 or len(refused) == 2:
            self.fail(f"{case.name}: two at once: {ends}")
        elif base.digests(self.folder) != case.new:
            self.fail(f"{case.name}: two at once: the folder holds {sorted(base.digests(self.folder))}")


def model(path: Path) -> Path:
    """A GGUF with random weights: matrices that become trit planes, Q8_0, norms, and one that falls back."""
    import numpy as np

    from ptqtp_gguf.files.gguf import OutTensor, kv_string, write_stream

    rng = np.random.default_rng(1)
    tensors, data = [OutTensor("token_embd.weight", (128, 96), 0)], [rng.normal(size=(96, 128))]
    for i in range(6):
        tensors += [OutTensor(f"blk.{i}.w.weight", (128, 64), 0), OutTensor(f"blk.{i}.attn_norm.weight", (128,), 0)]
        data += [rng.normal(size=(64, 128)) * 0.05, np.ones((1, 128))]
    data[5][-1, -1] = 20.0  # beyond the scales
    with open(path, "wb") as f:
        blocks = (d.astype(np.float32).view(np.uint8) for d in data)
        list(write_stream(f, [kv_string("general.architecture", "llama")], tensors, 32, blocks))
    return path


def checkpoint(folder: Path) -> None:
    """A random Llama of two layers in several shards, as the tests have it; made in another process."""
    code = "import sys; from pathlib import Path; from tiny_models import FAMILIES, build;"
    code += "build(FAMILIES['llama'], Path(sys.argv[1]), [1, 2, 3])"
    support = str(base.HERE.parents[1] / "tests" / "support")
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | {"PYTHONPATH": support}
    folder.mkdir()
    subprocess.run([sys.executable, "-c", code, str(folder)], env=env, check=True, capture_output=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200, help="calls that fail, over all cases")
    parser.add_argument("--limits", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", default=",".join(SMALL), help=f"of {', '.join([*SMALL, *LARGE, SERVE])}; or all")
    parser.add_argument(
        "--actions", default="", help="only these: KILL,TORN (in mid-call) or ENOSPC, EIO, SHORT, CLOCK ..."
    )
    parser.add_argument("--seconds", type=float, default=0, help="stop then, however many points are left")
    parser.add_argument("--only", action="append", default=[], help="a point as a failure prints it; repeatable")
    args = parser.parse_args()
    base.under_layer()
    names = [*SMALL, *LARGE, SERVE] if args.cases == "all" else args.cases.split(",")
    if args.only:
        names = sorted({text.split()[0] for text in args.only})
    work = Path(os.environ["FAULTS_WORK"])
    try:
        return run(args, Bench(work, names))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(args: argparse.Namespace, bench: Bench) -> int:
    """All that was asked for; the exit code."""
    only = {base.action_of(name) for name in args.actions.split(",") if name}
    for case in bench.cases:
        print(f"{case.name}: {len(case.calls)} calls, {len(case.new)} files", flush=True)
    for text in args.only:
        name, op, k, action, mask, p, seed, jump = text.split()
        lasting = tuple(o for i, o in enumerate(OPS) if int(mask) >> i & 1)
        fault = Fault(OPS[int(op)], int(k), int(action), lasting, float(p), int(seed), int(jump))
        case = next(c for c in bench.cases if c.name == name)
        (bench.serve_point if name == SERVE else bench.point)(case, fault)
        args.points = args.limits = args.pairs = 0
    rng, started = random.Random(args.seed), time.monotonic()
    work = [("point", args.points), ("limit", args.limits), ("pair", args.pairs)]
    cases = [case for case in bench.cases if bench.has_points(case, only)]
    for kind, n in work:
        for i in range(n):
            if args.seconds and time.monotonic() - started > args.seconds:
                break
            case = cases[i % len(cases)] if kind == "point" else bench.cases[i % len(bench.cases)]
            if case.name == SERVE:
                if kind == "point":
                    assert bench.serving is not None
                    timed = only <= {base.KILL, base.TORN} and rng.random() < (0.9 if only else 0.5)
                    after = rng.uniform(0.2, 1.2) * bench.serving.ready
                    bench.serve_point(case, None if timed else bench.choose(case, rng, only), after if timed else None)
            elif kind == "point":
                bench.point(case, bench.choose(case, rng, only))
            elif kind == "limit":
                bench.limit(case, rng)
            elif case.new and case.name not in ("force", "card"):
                bench.pair(case, rng)
    for case in bench.cases:
        mine = {end: n for (name, end), n in sorted(bench.counts.items()) if name == case.name}
        print(f"{case.name}: {sum(mine.values())} points: {', '.join(f'{n} {end}' for end, n in mine.items())}")
    print(f"{sum(bench.counts.values())} points, {len(bench.failures)} failures, seed {args.seed}")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
