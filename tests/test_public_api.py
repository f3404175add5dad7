import ast
import inspect
import re
from pathlib import Path

import pytest

import lightning_mp
from lightning_mp import errors

ROOT = Path(__file__).parents[1]

# What user code, YAML files and checkpoints may name. A name outside this list is a promise that
# nobody decided to make.
CONTRACT = {
    "DynamicLossScale",
    "FP32Pin",
    "FP8Config",
    "FP8Monitor",
    "FP8UnavailableError",
    "GradientRangeMonitor",
    "LightningMPError",
    "LossScaleError",
    "LossScaleMonitor",
    "MemoryEstimate",
    "MixedPrecision",
    "OverflowFoundError",
    "OverflowMonitor",
    "PrecisionReport",
    "PrecisionSummary",
    "SettingTypeError",
    "SettingValueError",
    "StaticLossScale",
    "UnmatchedPatternError",
    "UnsupportedError",
    "__version__",
    "estimate_memory",
    "metrics",
}


def imported_names() -> list[str]:
    """Names imported at once or, under TYPE_CHECKING, at first use."""
    tree = ast.parse((ROOT / "lightning_mp" / "__init__.py").read_text())
    own = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "lightning_mp" in str(node.module)]
    return [alias.asname or alias.name for node in own for alias in node.names]


def test_all_holds_exactly_the_names_that_the_package_imports() -> None:
    assert sorted(lightning_mp.__all__) == sorted(imported_names())


def test_names_imported_at_first_use_are_found_and_others_are_not() -> None:
    assert set(dir(lightning_mp)) >= set(lightning_mp.__all__)
    assert all(getattr(lightning_mp, name) is not None for name in lightning_mp.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'FP64Pin'"):
        lightning_mp.FP64Pin  # noqa: B018


def test_all_is_sorted_without_repeats() -> None:
    assert lightning_mp.__all__ == sorted(set(lightning_mp.__all__))


def test_every_public_name_is_in_the_contract() -> None:
    assert set(lightning_mp.__all__) - CONTRACT == set()


def test_every_public_class_and_function_has_its_own_docstring() -> None:
    public = [getattr(lightning_mp, name) for name in lightning_mp.__all__ if name != "__version__"]
    without = [each.__name__ for each in public if not vars(each).get("__doc__", each.__doc__)]
    assert without == []


def test_every_error_is_in_one_tree_and_a_builtin_that_callers_know() -> None:
    classes = [getattr(errors, name) for name in errors.__all__ if name != "LightningMPError"]
    assert all(issubclass(each, errors.LightningMPError) for each in classes)
    assert all(issubclass(each, (ValueError, TypeError, RuntimeError)) for each in classes)
    defined = [name for name, each in vars(errors).items() if inspect.isclass(each)]
    assert sorted(errors.__all__) == sorted(defined)


def test_top_version_of_the_changelog_is_the_version_of_the_package() -> None:
    found = re.search(r"^## \[(?P<version>[^\]]+)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert found is not None
    assert found["version"] == lightning_mp.__version__
