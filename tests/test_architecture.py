"""The order of the rooms that docs/architecture.md sets, read from the imports, and what must not be
imported early."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pydefect
from pydefect.config import MethodConfig
from pydefect.registry import METHODS, detector_type

PACKAGE = Path(pydefect.__file__).parent

# Lowest first. A room may import its own floor's and lower floors' rooms.
FLOORS = [
    ["version", "errors", "declared", "randomness", "contexts", "forking", "cuda_graphs", "places", "shapes"],
    ["config", "ops", "data", "preprocessing", "backbones"],
    ["progress", "interruption", "persistence", "heap", "metrics", "calibration"],
    ["buildinfo", "features", "kmeans", "scoring", "crossfit"],
    ["detector"],
    ["feature_detector"],
    ["baselines", "conpatch", "dual_ae", "evaluation"],
    ["onnx_export", "registry", "run"],
    ["api"],
    ["benchmark"],
    ["visualization", "charts"],
    ["score_folder", "report"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# Files of the package's own top: it opens all rooms on first use.
TOP = {"__init__", "_native"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(["pydefect", *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, *, also_lazy: bool = True) -> set[str]:
    """Modules of pydefect that a module imports; without ``also_lazy`` only those that it imports on being
    imported."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if not also_lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "pydefect")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            if node.module and node.module.split(".")[0] == "pydefect":
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    # What the package's top hands on is of the room that it comes from.
                    there = (
                        pydefect._ROOMS.get(alias.name, node.module) if node.module == "pydefect" else None
                    )
                    found.add(submodule if submodule in MODULES else there or node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    return found - {name}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_room_has_its_floor():
    assert {room(module) for module in MODULES} - TOP == set(LEVEL)


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) not in TOP])
def test_no_room_imports_an_upper_one(module):
    for imported in imports(module):
        if room(imported) not in TOP:
            assert LEVEL[room(imported)] <= LEVEL[room(module)], f"{module} imports {imported}"


def test_data_calibration_and_operators_know_nothing_of_detectors():
    for module in MODULES:
        if room(module) in (
            "ops",
            "data",
            "preprocessing",
            "backbones",
            "metrics",
            "calibration",
            "places",
            "persistence",
            "config",
        ):
            allowed = {
                room(module),
                "declared",
                "errors",
                "places",
                "randomness",
                "shapes",
                "version",
                "__init__",
            }
            if room(module) == "config":
                allowed |= {"preprocessing"}  # which a method's settings say
            if room(module) == "backbones":
                allowed |= {"ops"}
            assert {room(imported) for imported in imports(module)} <= allowed, module


def test_nobody_imports_a_method():
    """A further method must not need changes all over the package: the registry names its module."""
    methods = {entry.module.split(".")[1] for entry in METHODS.values()}
    # A command that serves one method alone.
    own = {"pydefect.cli.pretrain_teacher": {"dual_ae"}}
    for module in MODULES:
        allowed = {room(module)} | own.get(module, set())
        assert not {room(name) for name in imports(module)} & methods - allowed, module


def test_every_method_keeps_to_the_protocol():
    for name, entry in METHODS.items():
        found = detector_type(name)
        assert issubclass(found, pydefect.Detector)
        assert not found.__abstractmethods__, name
        assert found.method == name
        assert issubclass(found.config_type, MethodConfig)
        assert found.config_type.from_preset("default") == found.config_type()
        assert entry.summary
        assert f'``"{name}"``' in pydefect.fit.__doc__


def test_no_cycles():
    """Over what is imported on being imported, a package standing for its ``__init__``."""
    graph = {name: imports(name, also_lazy=False) & set(MODULES) for name in MODULES}
    graph["pydefect"] -= {"pydefect"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_importing_pydefect_does_not_import_torch():
    loaded = run_python("import sys, pydefect; print(*sorted(sys.modules))").split()
    assert "pydefect" in loaded
    assert not {"torch", "numpy", "cv2", "typer"} & set(loaded)


def test_help_does_not_import_torch():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['pydefect', '--help']\n"
        "try:\n    runpy.run_module('pydefect', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print('LOADED', *sys.modules)"
    )
    out, _, loaded = run_python(code).partition("LOADED")
    assert "evaluate" in out
    assert not {"torch", "cv2"} & set(loaded.split())


def test_the_public_face_is_complete():
    for name in pydefect.__all__:
        assert getattr(pydefect, name) is not None
    assert set(pydefect.__all__) == {*pydefect._ROOMS, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = pydefect.fitt


def test_the_operators_have_twins_of_the_same_signature():
    from inspect import signature

    from pydefect import ops
    from pydefect.ops import reference

    assert ops.__all__ == reference.__all__
    for name in ops.__all__:
        native, twin = signature(getattr(ops, name)), signature(getattr(reference, name))
        assert native.parameters == twin.parameters, name


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) != "__main__"])
def test_what_a_module_exports_is_there(module):
    loaded = importlib.import_module(module)
    for name in getattr(loaded, "__all__", []):
        assert hasattr(loaded, name)


# Of an operation that has no kernel on a card, the reason.
CPU_ONLY = {
    "convolution": "on a card it is cuDNN's",
    "convolution_tiles": "of the CPU's convolution",
    "convolution_weight_gradient": "on a card it is cuDNN's",
}
REPOSITORY = Path(__file__).parents[1]


def test_every_cuda_source_is_compiled():
    (named,) = re.findall(
        r"set\(cuda_operations ([^)]*)\)", (REPOSITORY / "CMakeLists.txt").read_text(encoding="utf-8")
    )
    sources = {path.stem for path in (REPOSITORY / "csrc/cuda").glob("*.cu")}
    assert sources == {*named.split(), "driver"}


def test_no_operation_is_forgotten():
    """What docs/adding-an-operation.md asks for, where nothing else would show that it is missing."""
    from pydefect import ops

    def names_in(path: str, table: str) -> set[str]:
        tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(one, ast.Name) and one.id == table for one in targets):
                assert isinstance(node, ast.Assign | ast.AnnAssign)
                assert isinstance(node.value, ast.Dict)
                return {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
        raise AssertionError(f"{path} has no {table}")

    every = set(ops.__all__)
    drawn = names_in("tests/ops/test_awkward_shapes.py", "OPERATORS")
    assert drawn == every - {"convolution_tiles"}  # whose only argument is a weight
    streamed = {name.split()[0] for name in names_in("tests/ops/test_cuda_kernels.py", "STREAMED")}
    assert every - streamed == set(CPU_ONLY)
    page = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(r"^\| (`.*?) \|", page.split("## The operations")[1], flags=re.MULTILINE))
    assert every <= set(re.findall(r"`(\w+)`", rows))
