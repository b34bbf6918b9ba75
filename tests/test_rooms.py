"""Which module may import which: the rooms of the package, from the command line down to the ground floor."""
import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"icf": ROOT / "icf", "icf_kernels": ROOT / "kernels"}
BELOW = {  # what each room may import besides itself; operators come from `icf.ops` alone
    "cli": {"studies", "engine", "model", "objective", "data", "ground", "ops", "icf_kernels"},
    "studies": {"engine", "model", "objective", "data", "ground", "ops"},
    "engine": {"model", "objective", "data", "ground", "ops"},
    "model": {"objective", "ground", "ops"},
    "objective": {"ground", "ops"},
    "data": {"ground", "ops"},
    "ground": {"ops"},
    "ops": {"icf_kernels"},
    "icf_kernels": set(),
}


def room(module: str) -> str:
    """Modules beside the folders of `icf`, but for `cli`, which `__main__` is too, and `ops`, are the ground floor."""
    package, *names = module.split(".")
    if package != "icf":
        return package
    names = ["cli"] if names == ["__main__"] else names
    return names[0] if names and names[0] in BELOW else "ground"


def find_modules(packages: dict[str, Path]) -> dict[str, Path]:
    """The file of every module, by its name."""
    files = {}
    for package, folder in packages.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def read_imports(tree: ast.AST, lazy: bool = True):
    """Statements that import: those of functions where `lazy`, never those below `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif is_for_types(node):
            for other in node.orelse:
                yield from read_imports(ast.Module([other], []), lazy)
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from read_imports(node, lazy)


def find_targets(module: str, files: dict[str, Path], lazy: bool) -> set[str]:
    """Modules of ours that a module imports."""
    targets, path = set(), files[module]
    for node in read_imports(ast.parse(path.read_text(encoding="utf-8")), lazy):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                parents = module.split(".")[:len(module.split(".")) - node.level + (path.name == "__init__.py")]
                base = ".".join([*parents, *filter(None, [node.module])])
            # of `from a import b`, b is a module or something in a
            names = [name if (name := f"{base}.{alias.name}") in files else base for alias in node.names]
        targets |= {name for name in names if name.split(".")[0] in PACKAGES}
    return targets - {module}


def find_violations(packages: dict[str, Path]) -> list[str]:
    """Imports against the order of the rooms, in functions, too, and modules that import one another as they load.

    Imports for type annotations alone are free: nothing runs, and a model may name the `Batch` it is given. So are the
    names of modules that `icf/__init__.py` holds as strings, for what is imported when first asked for.
    """
    files = find_modules(packages)
    wrong = [f"{module} imports {target}" for module in files for target in sorted(find_targets(module, files, True))
             if room(target) not in {room(module), *BELOW[room(module)]}]
    try:
        TopologicalSorter({module: find_targets(module, files, False) for module in files}).prepare()
    except CycleError as error:
        wrong.append("circle: " + " <- ".join(error.args[1]))
    return wrong


def test_imports_go_down_the_rooms():
    assert find_violations(PACKAGES) == []


def test_every_folder_is_a_room_and_every_room_is_there():
    folders = {path.parent.name for path in PACKAGES["icf"].glob("*/__init__.py")}
    assert folders == BELOW.keys() - {"cli", "ground", "ops", "icf_kernels"}


@pytest.mark.parametrize(("file", "code", "told"), [
    ("objective/mit.py", "from icf.model.icf import ICF", "icf.objective.mit imports icf.model.icf"),
    ("objective/mit.py", "from icf.data import Batch", "icf.objective.mit imports icf.data"),
    ("data/audio.py", "import icf.objective.mit", "icf.data.audio imports icf.objective.mit"),
    ("data/audio.py", "from icf.model import icf as network", "icf.data.audio imports icf.model.icf"),
    ("data/audio.py", "def f():\n    from icf.engine.train import train", "icf.data.audio imports icf.engine.train"),
    ("data/audio.py", "from ..engine import train", "icf.data.audio imports icf.engine.train"),
    ("data/__init__.py", "from ..engine import train", "icf.data imports icf.engine.train"),
    ("model/icf.py", "from icf.engine.train import train", "icf.model.icf imports icf.engine.train"),
    ("model/icf.py", "from icf.data import Batch", "icf.model.icf imports icf.data"),
    ("engine/train.py", "if True:\n    import icf.studies.bench", "icf.engine.train imports icf.studies.bench"),
    ("studies/bench.py", "from icf import cli", "icf.studies.bench imports icf.cli"),
    ("config.py", "class A:\n    from icf.data import audio", "icf.config imports icf.data.audio"),
    ("ops.py", "try:\n    import icf.model.icf\nexcept ImportError: pass", "icf.ops imports icf.model.icf"),
    ("model/icf.py", "import icf_kernels.room.api", "icf.model.icf imports icf_kernels.room.api"),
    ("../icf_kernels/room/api.py", "import icf.ops", "icf_kernels.room.api imports icf.ops"),
    ("../icf_kernels/room/api.py", "def f():\n    import icf", "icf_kernels.room.api imports icf"),
    ("files.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import icf.cli", "icf.files imports icf.cli"),
])
def test_a_planted_violation_is_found(tmp_path, file, code, told):
    assert find_violations(plant(tmp_path, {file: code})) == [told]


@pytest.mark.parametrize("code", [
    ("from icf.data.audio import b", "from icf.data.folder import a"),
    ("from . import audio", "import icf.data.folder"),
    ("if True:\n    from icf.data.audio import b", "class A:\n    from icf.data.folder import a")])
def test_a_circle_is_found(tmp_path, code):
    found, = find_violations(plant(tmp_path, dict(zip(("data/folder.py", "data/audio.py"), code, strict=True))))
    assert found.startswith("circle: icf.data.") and "icf.data.folder" in found and "icf.data.audio" in found


@pytest.mark.parametrize(("file", "code"), [
    ("model/icf.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from icf.data import Batch"),
    ("model/icf.py", "import typing\nif typing.TYPE_CHECKING:\n    from icf.data import Batch"),
    ("model/icf.py", "from icf.objective import mit\nfrom .. import config\nimport torch"),
    ("ops.py", "from icf_kernels.room import api"),
    ("data/audio.py", "def f():\n    from icf.data import folder\nfrom icf import config"),
    ("cli.py", "from icf.studies import bench\nfrom icf.engine import train")])
def test_what_is_allowed_is_not_found(tmp_path, file, code):
    files = {file: code, **({"data/folder.py": "import icf.data.audio"} if file == "data/audio.py" else {})}
    assert find_violations(plant(tmp_path, files)) == []


def plant(folder: Path, files: dict[str, str]) -> dict[str, Path]:
    """A small tree of rooms, all modules of which are empty but for some."""
    modules = ("cli.py", "config.py", "ops.py", "files.py", "studies/bench.py", "engine/train.py", "model/icf.py",
               "objective/mit.py", "data/audio.py", "data/folder.py", "../icf_kernels/room/api.py")
    packages = {"icf": folder / "icf", "icf_kernels": folder / "icf_kernels"}
    for name in (*modules, *files):
        path = folder / "icf" / name
        for parent in (path.parent, *path.parent.parents):
            if parent.is_relative_to(folder) and parent != folder and not parent.exists():
                parent.mkdir(parents=True)
                (parent / "__init__.py").touch()
        path.write_text(files.get(name, ""))
    return packages
