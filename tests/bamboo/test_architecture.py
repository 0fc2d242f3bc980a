"""Imports point one way, nothing unsafe is called, and units are converted in one place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "bamboo").rglob("*.py"), *(ROOT / "md").rglob("*.py")])
# rooms of the force field in the order of ARCHITECTURE.md: a file imports from its own room and those before
ROOMS = [
    ["bamboo.units", "bamboo.errors", "bamboo.elements", "bamboo.files", "bamboo.signals"],
    ["bamboo.system"],
    ["bamboo.neighbors"],
    ["bamboo.nn", "bamboo.terms"],
    ["bamboo.forcefield"],
    ["bamboo.checkpoint", "bamboo.published", "bamboo.kernels"],
    ["bamboo.evaluator"],
    ["bamboo.calculator", "bamboo.structure"],
    ["bamboo.quantum"],
    ["bamboo.learn"],
    ["md"],
]
# rooms of the simulation; what is not listed comes last
MD_ROOMS = [["md.engine"], ["md.trajectory"], ["md.analysis"]]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Return the dotted names of everything a file imports, at any depth of it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def room_of(name, rooms):
    """Return the index of the room a dotted name lives in, or None."""
    for index, members in enumerate(rooms):
        if any(name == member or name.startswith(member + ".") for member in members):
            return index
    return None


def test_files_were_found():
    names = {name_of(path) for path in FILES}
    assert {"bamboo", "bamboo.units", "bamboo.nn.get", "md"} <= names
    homeless = [name for name in names if name != "bamboo" and room_of(name, ROOMS) is None]
    assert not homeless, f"give these modules a room: {homeless}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    name = name_of(path)
    if name == "bamboo":  # its public names are imported on first use
        return
    own = room_of(name, ROOMS)
    for imported in imports(path):
        other = room_of(imported, ROOMS)
        assert other is None or other <= own, f"{name} imports {imported}, which comes after it"


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p).startswith("md")], ids=name_of)
def test_rooms_of_the_simulation(path):
    name = name_of(path)
    own = room_of(name, MD_ROOMS)
    if own is None:
        return
    for imported in imports(path):
        if imported == "torch" or imported.startswith("torch."):
            assert not name.startswith("md.analysis"), f"{name} imports torch"
        other = room_of(imported, MD_ROOMS)
        inside = imported.startswith("md.") and len(imported.split(".")) > 1
        if inside and other is not None:
            assert other <= own, f"{name} imports {imported}, which comes after it"


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "yaml.load", "os.system"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_unsafe(path):
    for imported in imports(path):
        assert imported.split(".")[0] not in FORBIDDEN_MODULES, f"{imported} executes what it reads"
        if imported.split(".")[0] == "pickletools":
            assert name_of(path) == "bamboo.published", "pickles are looked at in one place only"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_CALLS, f"{path}:{node.lineno}: {called}"
            pickles = [word for word in node.keywords if word.arg == "allow_pickle"]
            assert all(ast.unparse(word.value) == "False" for word in pickles), f"{path}:{node.lineno}: {called}"
        if isinstance(node, ast.ExceptHandler):
            bare = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            silent = all(isinstance(line, ast.Pass) for line in node.body)
            assert not (bare and silent), f"{path}:{node.lineno}: silent except"


# the mantissas of factors that belong to units.py: kcal/mol, hartree, bohr, Debye, k_B, eV in J, k_e, fs, amu, ...
MANTISSAS = (
    "4336", "23060", "23061", "27211", "529177", "18897", "208194", "20819", "48032", "861733", "1602176", "1380649",
    "14399", "14400", "332063", "332064", "10180", "98226", "160217", "160218", "6022140", "6022141", "1660539",
    "627509", "2625499", "4184",
)  # fmt: skip


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "units.py"], ids=name_of)
def test_conversion_factors_live_in_units(path):
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value:
            digits = f"{abs(node.value):.9e}".split("e")[0].replace(".", "")
            assert not digits.startswith(MANTISSAS), (
                f"{path}:{node.lineno}: {node.value} looks like a conversion factor"
            )


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_bamboo_is_free_of_side_effects():
    """It opens nothing but source files, and imports no torch."""
    code = """
import sys
opened = []
def watch(event, args):
    if event == "open" and isinstance(args[0], str) and not args[0].endswith((".py", ".pyc")):
        opened.append(args[0])
    if event in ("os.mkdir", "socket.connect", "subprocess.Popen"):
        opened.append(event)
sys.addaudithook(watch)
import bamboo
print([name for name in opened if "__pycache__" not in name])
print(sorted({"torch", "numpy", "ase", "rdkit"} & set(sys.modules)))
"""
    opened, heavy = run_python(code).splitlines()
    assert opened == "[]"
    assert heavy == "[]"


def test_public_names():
    import bamboo

    for name in bamboo.__all__:
        assert getattr(bamboo, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Bambo'"):
        bamboo.Bambo  # noqa: B018
