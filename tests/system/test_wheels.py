"""A wheel holds the runtime under a name of ours (tools/build/wheels.py). Compiling one takes too long for the suite:
what is around it is tried here, with the runtime that is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from helpers import REPO
from talking_model import write_talking_model

import ptqtp_gguf
from ptqtp_gguf.llamacpp import install

sys.path.insert(0, str(REPO / "tools" / "build"))
import build_runtime
import index
import wheels

# -I -S: no other folder is looked into, and no editable installation takes its place
RUN = "import sys; sys.path.insert(0, sys.argv[1]); sys.path.append(sys.argv[2]); exec(sys.argv[3])"
SITE = Path(str(metadata.distribution("numpy").locate_file("")))
STOCK = build_runtime.read_upstream().version
SAY = """
from ptqtp_gguf.llamacpp import bindings, install, load, read_grammar, system_info, why_not_loadable
from pathlib import Path
path = Path(sys.argv[4])
assert bindings.bundled() and install.package_dir().parent == Path(sys.argv[1]) / "ptqtp_gguf"
assert why_not_loadable(path) is None
model = load(path, n_ctx=64)
print(install.version(), model("ab", max_tokens=4, temperature=0)["choices"][0]["text"].encode())
print(sorted(n for n in sys.modules if n.partition(".")[0] == "llama_cpp"))
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import llama_cpp\n", "from ptqtp_gguf import _llama_cpp as llama_cpp\n"),
        ("import llama_cpp.llama as llama\n", "import ptqtp_gguf._llama_cpp.llama as llama\n"),
        (
            "import llama_cpp.llama\n",
            "import ptqtp_gguf._llama_cpp.llama; from ptqtp_gguf import _llama_cpp as llama_cpp\n",
        ),
        ("from llama_cpp.a import (\n    b,\n)\n", "from ptqtp_gguf._llama_cpp.a import (\n    b,\n)\n"),
        ("from .llama_cpp import *\n", "from .llama_cpp import *\n"),
        ("import llama_cpp_other\n", "import llama_cpp_other\n"),
        ('"""\n>>> import llama_cpp\n"""\n', '"""\n>>> import llama_cpp\n"""\n'),
    ],
)
def test_imports_are_renamed(before: str, after: str) -> None:
    assert wheels.renamed(before) == after
    assert not any(n.partition(".")[0] == "llama_cpp" for _, n in wheels.imported(after))


def test_what_cannot_be_renamed_is_refused() -> None:
    with pytest.raises(build_runtime.BuildError, match="line 1: imports several packages"):
        wheels.renamed("import os, llama_cpp\n")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as a wheel has it; what is not changed are links."""
    folder = tmp_path_factory.mktemp("bundled")
    package = folder / "ptqtp_gguf"
    package.mkdir()
    for path in Path(ptqtp_gguf.__file__).parent.iterdir():
        if path.name not in ("__pycache__", wheels.BUNDLED):
            (package / path.name).symlink_to(path)
    # the package's own files are looked for from llamacpp
    (package / "llamacpp").unlink()
    (package / "llamacpp").mkdir()
    for path in (Path(ptqtp_gguf.__file__).parent / "llamacpp").glob("*.py"):
        (package / "llamacpp" / path.name).write_bytes(path.read_bytes())
    wheels.bundle(install.package_dir(), package / wheels.BUNDLED, os.symlink)
    return folder


def run(folder: Path, code: str, *more: str, site: Path = SITE, **set_to: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != install.LIB_PATH} | set_to
    command = [sys.executable, "-I", "-S", "-c", RUN, str(folder), str(site), code, *more]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.mark.runtime
def test_the_bundled_runtime_is_used(bundled: Path, tmp_path: Path) -> None:
    model = write_talking_model(tmp_path / "m.gguf")
    done = run(bundled, SAY, str(model), LLAMA_CPP_LIB_PATH=str(tmp_path))  # for another llama_cpp, and of no effect
    assert done.returncode == 0, done.stderr
    said, others = done.stdout.splitlines()
    assert re.fullmatch(rf"{re.escape(STOCK)}\+ptqtp\.\d+ b'.+'", said)
    assert others == "[]"


@pytest.mark.runtime
def test_a_wheel_that_lacks_files(bundled: Path) -> None:
    """The way out is another one than in a clone."""
    code = """
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.errors import RuntimeMissing
try:
    install.tool("llama-nothing")
except RuntimeMissing as e:
    print(e)
"""
    done = run(bundled, code)
    assert done.stdout.startswith("tool llama-nothing is missing at ")
    assert done.stdout.endswith("; install ptqtp-gguf again\n")


def distribution(folder: Path, version: str) -> None:
    """What pip leaves of an installed llama-cpp-python."""
    info = folder / f"llama_cpp_python-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n")


POINT = """
sys.path.insert(0, sys.argv[4])
from ptqtp_gguf import point_llama_cpp
from ptqtp_gguf.errors import PtqtpError
try:
    print(point_llama_cpp())
except PtqtpError as e:
    sys.exit(str(e))
"""


@pytest.mark.runtime
def test_a_stock_llama_cpp_of_that_version_runs_our_files(bundled: Path, tmp_path: Path) -> None:
    """Its Python files, out of the sdist; its own libraries, which are not there, are not wanted."""
    upstream = build_runtime.read_upstream()
    with tarfile.open(build_runtime.find_sdist(None, REPO / "build", upstream)) as sdist:
        for member in sdist.getmembers():
            _, _, inside = member.name.partition("/")
            if inside.startswith("llama_cpp/") and inside.endswith(".py"):
                (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
                file = sdist.extractfile(member)
                assert file
                (tmp_path / inside).write_bytes(file.read())
    distribution(tmp_path, STOCK)
    model = write_talking_model(tmp_path / "m.gguf")
    use = "import llama_cpp\nm = llama_cpp.Llama(sys.argv[5], n_ctx=64, verbose=False)\n"
    use += "print(llama_cpp.__version__, m('ab', max_tokens=4, temperature=0)['choices'][0]['text'].encode())"
    done = run(bundled, POINT + use, str(tmp_path), str(model))
    assert done.returncode == 0, done.stderr
    folder, said = done.stdout.splitlines()
    assert folder == str(bundled / "ptqtp_gguf" / wheels.BUNDLED / "lib")
    assert re.fullmatch(rf"{re.escape(STOCK)} b'.+'", said)


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("version", "first", "why"),
    [
        (
            "0.3.20",
            "",
            rf"llama-cpp-python 0\.3\.20 is installed, and the libraries here fit {re.escape(STOCK)} alone; "
            rf"pip install llama-cpp-python=={re.escape(STOCK)}",
        ),
        (STOCK, "sys.modules['llama_cpp'] = sys\n", "llama_cpp is imported already, with its own libraries; .*"),
    ],
    ids=["another version", "too late"],
)
def test_pointing_is_refused(bundled: Path, tmp_path: Path, version: str, first: str, why: str) -> None:
    distribution(tmp_path, version)
    done = run(bundled, first + POINT, str(tmp_path))
    assert done.returncode == 1 and re.fullmatch(why, done.stderr.strip())


# ---- an index of wheels ----


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A small one."""
    made = tmp_path / "dist" / "some_thing-1.2-py3-none-any.whl"
    made.parent.mkdir()
    info = "some_thing-1.2.dist-info"
    files = {
        "some_thing.py": "value = 3\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: some-thing\nVersion: 1.2\nRequires-Python: >=3.10\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return made


def pip(out: Path, address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--no-deps"]
    command += ["--target", str(out), "--index-url", address, "--no-cache-dir", "some-thing"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_pip_installs_from_an_index(wheel: Path, tmp_path: Path) -> None:
    index.make([wheel], tmp_path / "index")
    address = f"{(tmp_path / 'index').as_uri()}/simple"
    done = pip(tmp_path / "site", address)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "some_thing.py").read_text() == "value = 3\n"
    kept = tmp_path / "index" / "simple" / "some-thing" / wheel.name
    sums = (tmp_path / "index" / "SHA256SUMS").read_text()
    assert sums == f"{build_runtime.sha256(wheel)}  simple/some-thing/{wheel.name}\n"
    kept.write_bytes(kept.read_bytes() + b"\0")  # another file than the page tells of
    done = pip(tmp_path / "other", address)
    assert done.returncode != 0 and "HASHES" in done.stderr
    assert not (tmp_path / "other" / "some_thing.py").exists()


def test_a_page_for_each_name(wheel: Path, tmp_path: Path) -> None:
    index.make([wheel], tmp_path / "index")
    index.make([wheel], tmp_path / "index")  # in the place of the last one
    names = (tmp_path / "index" / "simple" / "index.html").read_text()
    assert '<a href="some-thing/">some-thing</a>' in names
    files = (tmp_path / "index" / "simple" / "some-thing" / "index.html").read_text()
    assert f'href="{wheel.name}#sha256={build_runtime.sha256(wheel)}" data-requires-python="&gt;=3.10"' in files


def test_what_is_no_wheel(wheel: Path, tmp_path: Path) -> None:
    wheel.write_bytes(b"no archive")
    with pytest.raises(build_runtime.BuildError, match="not a wheel"):
        index.make([wheel], tmp_path / "index")
    with pytest.raises(build_runtime.BuildError, match="run make wheels"):
        index.make([], tmp_path / "index")
    assert not (tmp_path / "index").exists()


# ---- the release ----


def test_the_workflow_calls_what_is_there() -> None:
    """It runs elsewhere: here it is YAML, its jobs have the order that they need, and what it calls exists."""
    text = (REPO / ".github" / "workflows" / "release.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["release"]["needs"] == "wheels"
    commands = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    targets = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    asked = [t for line in re.findall(r"^make (.+)$", commands, re.MULTILINE) for t in line.split()]
    assert asked and set(asked) <= targets
    tools = re.findall(r"\btools/[\w/]+\.py", commands)
    assert tools and all((REPO / tool).is_file() for tool in tools)
    for job in jobs.values():
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_the_sysroot_is_whole() -> None:
    """The same packages for each machine, each with its digest."""
    lock = (REPO / "requirements" / "sysroot.debs").read_text()
    entries = re.findall(r"^([0-9a-f]{64})  pool/\S+/([^/_]+)_[^/_]+_(amd64|arm64)\.deb$", lock, re.MULTILINE)
    assert len(entries) == len(lock.splitlines()) - 1
    names = {arch: {name for _, name, of in entries if of == arch} for arch in wheels.DEBIAN_NAMES.values()}
    assert len(set(map(frozenset, names.values()))) == 1 and {"libc6", "libc6-dev"} <= names["amd64"]
