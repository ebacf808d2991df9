"""A room imports only rooms before it, through their faces, and each foreign package has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO

PACKAGE = REPO / "ptqtp_gguf"
# In the order of the flow. A room may import those before it, by the names in their __init__; docs/architecture.md.
ROOMS = [
    "codec",
    "files",
    "llamacpp",
    "source",
    "quantize",
    "plan",
    "inspect",
    "calibrate",
    "tune",
    "conversion",
    "distributed",
    "measure",
    "compare",
    "serve",
    "terminal",
    "commands",
]
FLOOR = ["errors", "progress", "system"]  # below all rooms; they import nothing of ours but each other
FRONT = ["", "__main__"]
DOORS = {  # _converter_child runs in the converter's process, with the converter's own gguf-py
    "gguf": {"files.gguf", "source._converter_child", "source._converter_hooks"},
    "ctypes": {
        "codec.native",
        "llamacpp.aborts",
        "llamacpp.log",
        "llamacpp.opened",
        "llamacpp.rpc",
        "llamacpp.install",
        "llamacpp.model",
        "llamacpp.tap",
        "source._converter_child",
        "source._converter_hooks",
    },
    "llama_cpp": {"llamacpp.bindings"},
    "torch": {
        "calibrate",
        "tune",
        "quantize.gptq",
        "quantize.torch_codec",
        "distributed.ranks",
        "measure.logits",
        "source._converter_child",
    },
    "transformers": {"calibrate", "tune", "measure.logits", "source._converter_hooks"},
    "huggingface_hub": {"source.hub"},
    "cuda": {"quantize.cuda.driver"},
    "matplotlib": {"compare.plots"},
    "jinja2": {"compare.page", "llamacpp.templates"},
    "markupsafe": {"compare.page"},
    "rich": {"terminal", "commands"},
    "typer": {"commands"},
}
TOP_LEVEL_TORCH = {"tune.layers", "tune.student"}  # others import torch inside functions
MAX_LINES = 500


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; a package by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__") if name != "__init__" else ""] = path
    return found


MODULES = modules()


def room_of(name: str) -> str:
    return name.partition(".")[0]


def imports(name: str) -> tuple[list[tuple[str, str]], set[str], set[str]]:
    """(module, imported name) of our own; foreign packages imported anywhere, and at the top level of the module."""
    own, foreign, top = [], set(), set()
    path = MODULES[name]
    tree = ast.parse(path.read_text())
    package = name.split(".")[:-1] if path.name != "__init__.py" else name.split(".") if name else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            here = {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            here = {(node.module or "").split(".")[0]}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module or "").split(".")] if node.module else base)
            for a in node.names:
                full = f"{target}.{a.name}".strip(".")
                own.append((full, "") if full in MODULES else (target, a.name))
            continue
        else:
            continue
        foreign |= here
        top |= here if node in tree.body else set()
    return own, foreign, top


def face(room: str) -> list[str]:
    """__all__ of a room."""
    for node in ast.parse(MODULES[room].read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return [str(x) for x in ast.literal_eval(node.value)]
    return []


def test_every_module_stands_in_a_room() -> None:
    loose = [n for n in MODULES if room_of(n) not in ROOMS and n not in (*FLOOR, *FRONT)]
    assert not loose
    assert sorted(ROOMS) == sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("name", [n for n in MODULES if n not in FRONT])
def test_imports_only_rooms_before_it_and_by_their_faces(name: str) -> None:
    mine = room_of(name)
    place = ROOMS.index(mine) if mine in ROOMS else -1
    for module, what in imports(name)[0]:
        room = room_of(module)
        if room in ("", mine) or room in FLOOR:
            assert room != "" or what == "__version__", f"{name} imports {what} from the front door"
            continue
        assert ROOMS.index(room) < place, f"{name} imports {module}; {room} comes after {mine}"
        taken = what or module.removeprefix(f"{room}.")
        assert module == room or not what, f"{name} imports {what} from {module}, not from the room {room}"
        assert taken in face(room), f"{name} imports {taken}, which is not in __all__ of {room}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_inside_a_room(room: str) -> None:
    inside = {n: {m for m, _ in imports(n)[0] if room_of(m) == room and m != n} for n in MODULES if room_of(n) == room}
    inside = {n: {m for m in needs if m in inside and m != room} for n, needs in inside.items() if n != room}
    while inside:
        free = [n for n, needs in inside.items() if not needs]
        assert free, f"a circle among {sorted(inside)}"
        inside = {n: needs - set(free) for n, needs in inside.items() if n not in free}


@pytest.mark.parametrize("room", ROOMS[:-1])
def test_a_face_says_what_the_room_is_for(room: str) -> None:
    tree = ast.parse(MODULES[room].read_text())
    doc, names = ast.get_docstring(tree), face(room)
    assert doc and doc.endswith(".") and "\n\n" not in doc
    assert names and len(set(names)) == len(names)
    bound = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert bound - {"annotations"} == set(names)
    functions = [n for n in names if f"{room}.{n}" in MODULES]
    told = {a.name for n in tree.body if isinstance(n, ast.ImportFrom) and n.module is None for a in n.names}
    assert set(functions) == told, "a name of the face that is a module's too"


@pytest.mark.parametrize("name", [n for n in MODULES if n])
def test_foreign_packages_come_through_their_doors(name: str) -> None:
    _, foreign, top = imports(name)
    for package, doors in DOORS.items():
        assert package not in foreign or {name, room_of(name)} & doors, f"{name} imports {package}; its door: {doors}"
    heavy = top & {"torch", "transformers"}
    assert not heavy or name in TOP_LEVEL_TORCH, f"{name} imports {heavy} when it is loaded"


def test_the_command_line_starts_without_the_heavy_packages(tmp_path: Path) -> None:
    """It imports every face: without --calib nothing needs torch, and a plain command starts in half a second."""
    code = "import sys, ptqtp_gguf.commands.app; print(*{'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not done.stdout.split()


@pytest.mark.parametrize("name", MODULES)
def test_modules_stay_small(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= MAX_LINES
