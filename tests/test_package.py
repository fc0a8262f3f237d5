"""What the package promises about itself: its names, its imports, its layers."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import terncomm

ROOT = Path(terncomm.__file__).parent
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "terncomm."))

# Who may import whom, beside itself. Numba only inside its own file.
ALLOWED = {
    "segments": set(),
    "keys": set(),
    "torch_internals": set(),
    "from_file": set(),
    "ops": {"segments"},
    "structure": set(),
    "layers": {"segments", "codecs", "structure", "torch_internals"},
    "wire": {"ops"},
    "codecs": {"ops", "segments", "keys", "wire", "from_file"},
    "testing": {"codecs", "path", "keys", "segments"},
    "transports": {"torch_internals"},
    "path": {"codecs", "ops", "segments", "keys", "wire", "transports.base"},
    "reduce": {"path", "codecs.base", "keys", "segments", "transports.base"},
    "hooks": {
        *("path", "ops", "codecs", "segments", "keys", "layers", "structure", "transports", "version"),
        "torch_internals",
    },
    "simulator": {
        "from_file",
        *("path", "reduce", "ops", "codecs", "segments", "keys", "layers", "structure", "transports", "version"),
        "torch_internals",
    },
    "version": set(),
    "watch": {"hooks"},
    "horovod": {"hooks", "transports", "codecs"},
    "lightning": {"hooks", "watch", "codecs", "transports.launched"},
    "transformers": {"hooks", "watch", "codecs", "transports.launched"},
    "report": {"simulator"},
    "commands": {"report", "simulator", "codecs", "layers", "structure", "transports"},
    "cluster": {"simulator", "version"},
    "cli": {"commands", "cluster", "version"},
    "__main__": {"cli"},
}

ADAPTERS = ("terncomm.horovod", "terncomm.lightning", "terncomm.transformers")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_every_module_imports():
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # an adapter says what it adapts to
            if name not in ADAPTERS or f"{name} needs" not in str(error):
                raise
    assert len(MODULES) > 15


def test_import_directions():
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imports(path):
            if not name.startswith("terncomm."):
                continue
            target = name.removeprefix("terncomm.")
            allowed = ALLOWED[room] | {room}
            if target.split(".")[0] in {rule.split(".")[0] for rule in allowed}:
                exact = {rule for rule in allowed if rule.startswith(target.split(".")[0])}
                ok = any(target == rule or target.startswith(rule + ".") or rule.startswith(target) for rule in exact)
                assert ok, f"{path.relative_to(ROOT)} imports {name}"
            else:
                raise AssertionError(f"{path.relative_to(ROOT)} imports {name}")


def test_import_terncomm_loads_torch_and_nothing_heavier():
    heavy = {"numba", "triton", "mpi4py", "horovod", "matplotlib", "sklearn", "lightning", "transformers"}
    heavy.add("terncomm.simulator")
    code = f"import sys, terncomm; hasattr(terncomm, 'no_such'); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_public_names():
    wanted = ["Codec", "CommState", "GradientAverager", "Int8", "Ternary", "Watch", "__version__", "comm_hook"]
    assert sorted(terncomm.__all__) == [*wanted, "reduce_gradients", "register"]
    for name in terncomm.__all__:
        thing = getattr(terncomm, name)
        assert name == "__version__" or thing.__doc__, name


ONE_BY_ONE = """
import terncomm
for name in {names}:
    try:
        print(getattr(terncomm, name).__name__)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_a_module_is_there_without_an_import_of_its_own():
    """As in README: `terncomm.lightning.CompressGradients`; or words that say what is missing."""
    names = ["horovod", "lightning", "reduce", "testing", "transformers", "transports", "simulator"]
    code = ONE_BY_ONE.format(names=names)
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert len(told) == len(names), done.stderr
    for name, line in zip(names, told, strict=True):
        assert line == f"terncomm.{name}" or line.startswith(f"terncomm.{name} needs"), line


def test_the_hook_takes_what_ddp_demands():
    """DDP refuses an annotated hook in a module with postponed annotations, and an argument of another name."""
    assert list(terncomm.comm_hook.__annotations__)[1] == "bucket"
    for path in (ROOT / "hooks").glob("*.py"):
        assert "from __future__ import annotations" not in path.read_text()
