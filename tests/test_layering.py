"""The order of the layers, read from the import statements of every file of the package."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_mp"

# A part is a file or a folder right inside the package.
LAYERS = (
    {"__about__", "errors", "formats"},
    {"numerics", "casting", "closures", "loss_scale", "selection", "hardware", "recompile", "stand_in"},
    {"grad_scaler", "master_weights", "pinning", "fp8", "overflow", "memory"},
    {"policy"},
    {"precision"},
    {"callbacks", "metrics", "report"},
    {"cli", "__init__", "__main__"},
)
LAYER_OF = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}
FIRST_LAYER_WITH_LIGHTNING = LAYER_OF["precision"]

# Parts of one layer that stand in an order of their own: a monitor draws with its metric and fills
# the page, the page draws with the metrics, and every file may raise.
WITHIN_LAYER = {
    ("formats", "errors"),
    ("callbacks", "metrics"),
    ("callbacks", "report"),
    ("report", "metrics"),
    ("__main__", "cli"),
}
WITH_TORCHMETRICS = {"metrics", "callbacks"}
TRANSFORMER_ENGINE_FILE = Path("fp8/transformer_engine.py")
TRITON_FILE = Path("master_weights/adam_kernel.py")
# Loaded by the function that needs them, never by importing the package.
LOADED_ON_USE = (
    "transformer_engine",
    "triton",
    "matplotlib",
    "rich",
    "jinja2",
    "transformers",
    "torchao",
    "pydoc_data",
)


@dataclass(frozen=True)
class Import:
    file: Path
    module: str
    line: int
    in_function: bool

    @property
    def part(self) -> str:
        return self.file.parts[0].removesuffix(".py")

    @property
    def root(self) -> str:
        return self.module.split(".")[0]

    @property
    def target(self) -> str:
        """The part of the package that is imported; the package itself is ``__init__``."""
        parts = self.module.split(".")
        return parts[1] if len(parts) > 1 and parts[1] in LAYER_OF else "__init__"

    def __str__(self) -> str:
        return f"lightning_mp/{self.file.as_posix()}:{self.line} imports {self.module}"


def imported_modules(node: ast.AST, file: Path) -> list[str]:
    """Return what one statement or call imports, as absolute dotted names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        folder = ("lightning_mp", *file.parts[:-1])
        base = folder[: len(folder) - node.level + 1] if node.level else ()
        return [".".join((*base, *filter(None, [node.module]), alias.name)) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        return [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


def walk(node: ast.AST, file: Path, *, in_function: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for module in imported_modules(child, file):
            yield Import(file, module, child.lineno, in_function)
        inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from walk(child, file, in_function=inside)


def imports_of(source: str, file: str) -> list[Import]:
    return list(walk(ast.parse(source), Path(file)))


FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
IMPORTS = [found for file in FILES for found in imports_of((PACKAGE / file).read_text(), str(file))]


def breaks_order(found: Import) -> bool:
    if found.root != "lightning_mp" or found.part == found.target:
        return False
    return (
        LAYER_OF[found.target] >= LAYER_OF[found.part]
        and found.part != "__init__"
        and (found.part, found.target) not in WITHIN_LAYER
    )


def breaks_lightning(found: Import) -> bool:
    is_lightning = found.root in {"lightning", "lightning_fabric", "pytorch_lightning", "lightning_utilities"}
    return is_lightning and LAYER_OF[found.part] < FIRST_LAYER_WITH_LIGHTNING


def breaks_torchmetrics(found: Import) -> bool:
    return found.root == "torchmetrics" and found.part not in WITH_TORCHMETRICS


def breaks_transformer_engine(found: Import) -> bool:
    is_engine = found.root in {"transformer_engine", "transformer_engine_torch"}
    return is_engine and not (found.file == TRANSFORMER_ENGINE_FILE and found.in_function)


def breaks_triton(found: Import) -> bool:
    return found.root == "triton" and not (found.file == TRITON_FILE and found.in_function)


RULES = [breaks_order, breaks_lightning, breaks_torchmetrics, breaks_transformer_engine, breaks_triton]


@pytest.mark.parametrize("rule", RULES)
def test_every_import_of_the_package_keeps(rule) -> None:
    assert [str(found) for found in IMPORTS if rule(found)] == []


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (breaks_order, "numerics.py", "from lightning_mp.policy import PrecisionPolicy"),
        (breaks_order, "numerics.py", "from lightning_mp.selection import clean_fqn"),
        (breaks_order, "pinning/modules.py", "from lightning_mp.grad_scaler import LossScaler"),
        (breaks_order, "pinning/modules.py", "from ..fp8.config import FP8Config"),
        (breaks_order, "pinning/modules.py", "from .. import precision"),
        (breaks_order, "policy.py", "def f():\n    from lightning_mp import MixedPrecision"),
        (breaks_order, "metrics/rate.py", "import lightning_mp.callbacks.pin"),
        (breaks_order, "errors.py", "from lightning_mp.formats import FORMATS"),
        (breaks_lightning, "policy.py", "from lightning.pytorch import Trainer"),
        (breaks_lightning, "fp8/convert.py", "import lightning"),
        (breaks_torchmetrics, "precision/plugin.py", "from torchmetrics import Metric"),
        (breaks_transformer_engine, "fp8/transformer_engine.py", "import transformer_engine.pytorch as te"),
        (breaks_transformer_engine, "fp8/convert.py", "def f():\n    import transformer_engine"),
        (breaks_transformer_engine, "hardware.py", "def f():\n    importlib.import_module('transformer_engine')"),
        (breaks_triton, "master_weights/adam_kernel.py", "import triton.language as tl"),
        (breaks_triton, "master_weights/split.py", "def f():\n    import triton"),
    ],
)
def test_rule_catches(rule, file, source) -> None:
    assert any(rule(found) for found in imports_of(source, file))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("pinning/modules.py", "from lightning_mp.pinning.functions import pinned\nfrom . import functions"),
        ("pinning/modules.py", "from lightning_mp.selection import select_modules"),
        ("precision/plugin.py", "from lightning.pytorch.plugins import Precision"),
        ("master_weights/adam_kernel.py", "def f():\n    import triton"),
        ("callbacks/range.py", "from lightning_mp.metrics import UnderflowFraction\nfrom torchmetrics import Metric"),
        ("fp8/transformer_engine.py", "def f():\n    import transformer_engine.pytorch as te"),
        ("__init__.py", "from lightning_mp.precision import MixedPrecision"),
    ],
)
def test_rules_let_pass(file, source) -> None:
    assert [str(found) for found in imports_of(source, file) for rule in RULES if rule(found)] == []


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {file.parts[0].removesuffix(".py") for file in FILES} <= set(LAYER_OF)


def test_no_file_is_a_drawer_for_everything() -> None:
    assert [str(file) for file in FILES if file.stem in {"utils", "util", "helpers", "common", "misc"}] == []


def run_python(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    # From the root, so that the files beside this test are the ones imported.
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent).stdout.strip()


def test_importing_the_package_loads_no_optional_library() -> None:
    # Lightning and torchmetrics load some of these themselves; only what comes on top is ours.
    code = f"""
import sys
import lightning.pytorch, torchmetrics
before = set(sys.modules)
import lightning_mp, lightning_mp.cli
print([name for name in {LOADED_ON_USE} if name in set(sys.modules) - before])
"""
    assert run_python(code) == "[]"


def test_importing_the_package_never_loads_transformer_engine() -> None:
    assert run_python("import sys, lightning_mp; print('transformer_engine' in sys.modules)") == "False"
