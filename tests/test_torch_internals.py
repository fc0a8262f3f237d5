"""Private attributes of torch: only one module reads them, and it says which one is missing. Some run on ranks."""

import ast
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_fsdp import sharded
from test_fsdp1 import flat
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import torch_internals
from terncomm.torch_internals import IncompatibleTorch

ROOT = Path(terncomm.__file__).parent
ALONE = ROOT / "torch_internals.py"
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}
BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def own_members(tree):
    """Private names that the classes of a file give to their members."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.FunctionDef):
                    found.add(each.name)
                elif isinstance(each, (ast.Assign, ast.AnnAssign)):
                    targets = each.targets if isinstance(each, ast.Assign) else [each.target]
                    found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own_object(node.value):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def is_own_object(node):
    if isinstance(node, ast.Name):
        return node.id in ("self", "cls")
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "super"


def private_attributes(source, never=frozenset()):
    """Lines and names of private attributes that do not belong to the file; those in `never` belong to no file."""
    tree = ast.parse(source)
    own = (own_members(tree) | OF_NAMED_TUPLES) - never
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not is_own_object(node.value) and node.attr not in own:
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if is_private(name) and not is_own_object(node.args[0]) and name not in own:
                yield node.lineno, name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            for name in [*node.module.split("."), *(alias.name for alias in node.names)]:
                if is_private(name):
                    yield node.lineno, name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch") and any(is_private(part) for part in alias.name.split(".")):
                    yield node.lineno, alias.name


def names_of_torch():
    """Private names that the module reads, as attributes or by their names."""
    tree = ast.parse(ALONE.read_text())
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {name for name in strings if is_private(name) and name.isidentifier()}


def test_private_attributes_of_torch_stand_in_one_module():
    never = names_of_torch()
    assert {"_handle", "_comm_hooks", "_devices", "_foreach_copy_"} <= never
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sorted(ROOT.rglob("*.py"))
        if path != ALONE
        for line, name in private_attributes(path.read_text(), never)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("unit._handle.flat_param", "_handle"),
        ("self.flat._params", "_params"),
        ("class A:\n    def f(self):\n        self._handle = unit._handle", "_handle"),
        ("torch._foreach_copy_(a, b)", "_foreach_copy_"),
        ("getattr(ddp, '_use_python_reducer', False)", "_use_python_reducer"),
        ("options._timeout = 3", "_timeout"),
        ("from torch.distributed.fsdp._flat_param import FlatParameter", "_flat_param"),
        ("from torch.distributed.distributed_c10d import _get_default_group", "_get_default_group"),
        ("import torch._dynamo", "torch._dynamo"),
        ("self._world._strange", "_strange"),
    ],
)
def test_the_search_finds(source, name):
    assert [found for _, found in private_attributes(source, names_of_torch())] == [name]


@pytest.mark.parametrize(
    "source",
    [
        "self._x, cls._x, super()._x",
        "request._replace(a=1), Header._fields",
        "class A:\n    def _set(self): ...\nmade._set()",
        "class A:\n    def f(self):\n        self._world = 1\nother._world",
        "error.__notes__",
    ],
)
def test_the_search_allows(source):
    assert list(private_attributes(source, names_of_torch())) == []


def message(owner, name, function, monkeypatch):
    monkeypatch.delattr(owner, name)
    with pytest.raises(IncompatibleTorch) as raised:
        function()
    return str(raised.value)


def test_a_missing_function_is_named(monkeypatch):
    text = message(
        dist,
        "_compute_bucket_assignment_by_size",
        lambda: torch_internals.bucket_assignment([torch.zeros(3)], [100]),
        monkeypatch,
    )
    assert text == (
        f"torch {torch.__version__} has no torch.distributed._compute_bucket_assignment_by_size, which terncomm needs "
        "to predict DDP's buckets (seen in 2.6 to 2.13): please report it, with this version of torch"
    )


def test_missing_attributes_of_tensors_and_groups_are_named(monkeypatch):
    text = message(torch, "_foreach_copy_", lambda: torch_internals.copy_all([], []), monkeypatch)
    assert "torch._foreach_copy_," in text
    text = message(
        dist.distributed_c10d, "_get_process_group_store", lambda: torch_internals.store_of(None), monkeypatch
    )
    assert "distributed_c10d._get_process_group_store, which terncomm needs to connect ranks" in text


@pytest.mark.parametrize("name", ["_devices", "_threads"])
def test_a_missing_option_of_gloo_is_named(name):
    theirs = SimpleNamespace(**{each: value for each, value in {"_devices": [], "_threads": 2}.items() if each != name})
    with pytest.raises(IncompatibleTorch, match=f"{name}, which"):
        torch_internals.gloo_options_like(SimpleNamespace(options=theirs), timedelta(seconds=1))


def test_a_timeout_is_not_guessed_for_a_backend_of_torch():
    gloo = SimpleNamespace(name=lambda: "gloo", options=SimpleNamespace())
    with pytest.raises(IncompatibleTorch, match="_timeout"):
        torch_internals.timeout_of(gloo)
    other = SimpleNamespace(name=lambda: "other")
    assert torch_internals.timeout_of(other) == dist.default_pg_timeout


def test_an_attribute_that_torch_does_not_read_is_not_made():
    unit = SimpleNamespace()
    with pytest.raises(IncompatibleTorch, match="_comm_hook_state"):
        torch_internals.set_fsdp1_hook_state(unit, 1)
    assert vars(unit) == {}


def test_a_mesh_of_another_kind_is_not_taken_for_replicated():
    group = SimpleNamespace(
        fsdp_params=[], device=None, mesh_info=SimpleNamespace(), _reduce_scatter_comm=None, _all_reduce_hook=None
    )
    module = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(_fsdp_param_groups=[group]))
    with pytest.raises(IncompatibleTorch, match="shard_process_group"):
        torch_internals.fsdp2_groups(module)


def test_one_group_of_fsdp2_as_in_torch_2_9():
    module = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(_fsdp_param_group=None))
    assert torch_internals.fsdp2_groups(module) == []


def registered_without(kind):
    """What register says about a model that lacks an attribute."""
    if kind == "DDP":
        model = DistributedDataParallel(nn.Linear(2, 2))
        del model._comm_hooks
    elif kind == "FSDP1":
        model = flat()
        del model._handle.flat_param._shapes
    else:
        model = sharded()
        group = model._get_fsdp_state()._fsdp_param_group
        del group._reduce_scatter_comm
    try:
        terncomm.register(model, "int8")
    except IncompatibleTorch as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "attribute"),
    [
        ("DDP", "DistributedDataParallel._comm_hooks"),
        ("FSDP1", "FlatParameter._shapes, which terncomm needs for FSDP1 (seen in 2.6 to 2.13)"),
        ("FSDP2", "FSDPParamGroup._reduce_scatter_comm, which terncomm needs for FSDP2 (seen in 2.9 to 2.13)"),
    ],
)
def test_register_names_a_missing_attribute(on_ranks, kind, attribute):
    for text in on_ranks(2, registered_without, kind):
        assert f"torch {torch.__version__} has no {attribute}" in text


def test_no_default_group_is_torchs_own_error():
    with pytest.raises(ValueError, match="has not been initialized"):
        torch_internals.default_group()
