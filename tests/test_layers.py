"""The structure of the package, held to."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import jaxdiff
from jaxdiff import data, generation, nn, plotting, training

ROOT = pathlib.Path(__file__).parent.parent
LAYER = {
    "extras": 0.0,
    "files": 0.05,
    "typing": 0.0,
    "rows": 0.1,
    "numerics": 0.2,
    "checks": 0.3,
    "processes": 1,
    **dict.fromkeys(("forward", "predictions", "probability_flow"), 2),
    "variational": 2,
    **dict.fromkeys(("timesteps", "weightings"), 2.1),
    "denoisers": 2.2,
    **dict.fromkeys(("mixtures", "guidance", "losses", "samplers", "likelihood"), 3),
    "metrics": 3,
    **dict.fromkeys(("nn", "data", "devices", "plotting"), 4),
    **dict.fromkeys(("training", "generation", "pretrained"), 5),
    "__init__": 6,
}
HEAVY = ("flax", "optax", "orbax", "tensorflow_datasets", "grain", "matplotlib", "sklearn")
MODULES = sorted((ROOT / "jaxdiff").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT / "jaxdiff").parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "jaxdiff" for alias in node.names)
            continue
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.level == 0, f"{path} has a relative import"
        package, _, rest = (node.module or "").partition(".")
        assert package != "experiments"
        if package != "jaxdiff":
            continue
        targets = [rest.split(".")[0]] if rest else [alias.name for alias in node.names]
        for target in targets:
            assert target == own or LAYER[target] < LAYER[own], f"{path} imports {target}"


def imported(path):
    """The modules of the library and the experiments that a module imports, at its top."""
    for node in ast.parse(path.read_text()).body:
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if module.partition(".")[0] in ("jaxdiff", "experiments"):
            for name in (module, *(f"{module}.{alias.name}" for alias in node.names)):
                yield ROOT.joinpath(*name.split(".")).with_suffix(".py")


def test_no_modules_import_each_other_in_a_circle():
    modules = {*MODULES, *EXPERIMENTS}
    below = {path: set(imported(path)) & modules for path in modules}
    while done := {path for path, others in below.items() if not others}:
        below = {path: others - done for path, others in below.items() if path not in done}
    assert not below, "\n".join(str(path) for path in below)


def test_networks_import_the_bottom_layer_only():
    for path in (ROOT / "jaxdiff" / "nn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxdiff."):
                assert node.module.split(".")[1] in (
                    ("nn", "typing", "rows", "numerics", "checks", "extras")
                )


def test_the_core_imports_nothing_heavy():
    code = f"import sys, jaxdiff; print([m for m in {HEAVY + ('diffrax',)} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_what_is_not_installed_is_said_with_its_extra():
    code = """if True:
        import sys
        sys.modules |= dict.fromkeys(("flax", "optax", "matplotlib", "PIL", "grain"))
        from jaxdiff import data, plotting
        calls = {
            "nn": lambda: __import__("jaxdiff.nn"),
            "training": lambda: __import__("jaxdiff.training"),
            "figure": lambda: plotting.new_figure(1, 1),
            "folder": lambda: data.load_folder(".", 8),
            "sheet": lambda: plotting.save_sheet("x.png", __import__("numpy").zeros((1, 8, 8, 1))),
        }
        for name, call in calls.items():
            try:
                call()
            except ImportError as error:
                print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    lines = run.stdout.splitlines()
    names = ("nn needs flax", "training needs", "plotting", "data.load_folder needs", "plotting")
    for line, name in zip(lines, names, strict=True):
        assert f"jaxdiff.{name}" in line
        assert "pip install 'jaxdiff[train]'" in line


def public_functions(path):
    """Functions of a module and methods of its classes, not those nested in other functions."""
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for member in members:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                yield member


def test_every_public_function_says_what_it_raises():
    for path in MODULES:
        for function in public_functions(path):
            text = ast.get_docstring(function)
            assert text, f"{path.name}:{function.name} has no docstring"
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    error = getattr(node.exc.func, "id", "")
                    assert error in text, f"{path.name}:{function.name} raises {error} unsaid"


def test_no_file_is_longer_than_400_lines():
    for path in [*MODULES, *EXPERIMENTS]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_modules_that_are_imported_by_name_list_their_names():
    found = {name: getattr(jaxdiff, name) for name in jaxdiff.__all__}
    modules = [each for each in found.values() if inspect.ismodule(each)]
    for module in (*modules, generation, plotting, data, nn, training):
        assert all(hasattr(module, each) for each in module.__all__), module.__name__


def test_the_version_is_a_string():
    assert jaxdiff.__version__.count(".") == 2


def test_constraints_are_names_and_versions_only():
    for line in (ROOT / ".constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        assert name, line
        assert version, line
        assert "/" not in line
