"""Find modules by class and by pattern over their dotted name; an item that finds none is an error."""

import difflib
import fnmatch
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from lightning_mp.errors import SettingTypeError, UnmatchedPatternError

__all__ = [
    "Selector",
    "clean_fqn",
    "is_normalization",
    "is_transposed_linear",
    "named_inner_modules",
    "select_modules",
]

Selector: TypeAlias = str | type[nn.Module]

# torch.compile, checkpoint_wrapper and FSDP1 put the wrapped module under these names.
_WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# These put it under ``module``, a name that a user's own module may have too.
_MODULE_WRAPPERS = (DistributedDataParallel, nn.DataParallel)
_MAX_NEAREST = 3

_NORMS: tuple[type[nn.Module], ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# LlamaRMSNorm, T5LayerNorm, ConvNextLayerNorm2d, LayerScaleNorm: libraries write their own.
_NORM_NAME = re.compile(r"norm(\dd)?$", re.IGNORECASE)


def clean_fqn(name: str, model: nn.Module | None = None) -> str:
    """Return a dotted name without what wrappers add to it.

    Args:
        name: Name of a module, parameter or buffer, as torch gives it.
        model: The module that ``name`` starts from. With it, a ``module`` that
            DistributedDataParallel or DataParallel adds is dropped as well. The name alone cannot
            tell that from an attribute of the user's, which stays.

    Returns:
        The name that the user would write.

    Example:
        >>> clean_fqn("encoder._orig_mod.norm._checkpoint_wrapped_module.weight")
        'encoder.norm.weight'
    """
    return ".".join(_own_components(name, model)) if name else ""


def _own_components(name: str, model: nn.Module | None) -> Iterator[str]:
    parent: object = model
    for component in name.split("."):
        added = component in _WRAPPER_COMPONENTS or (component == "module" and isinstance(parent, _MODULE_WRAPPERS))
        if not added:
            yield component
        # Not by ``_modules``, which is no dict where a module is scripted.
        parent = getattr(parent, component, None) if isinstance(parent, nn.Module) else None


def named_inner_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module under every name that it has, seen through wrappers.

    Args:
        model: Any module, wrapped or not. Its own name is the empty string.

    Returns:
        Clean dotted names in the order of ``named_modules``. A shared module appears once per name.
        Where a wrapper and what it wraps have the same name, the wrapped module is returned.
    """
    # A wrapper comes before what it wraps and has the same clean name, so the inner module stays.
    return {clean_fqn(name, model): module for name, module in model.named_modules(remove_duplicate=False)}


def select_modules(
    model: nn.Module, selectors: Selector | Iterable[Selector], *, argument: str
) -> dict[str, nn.Module]:
    """Return the modules that any of the patterns and classes selects.

    A pattern is matched by ``fnmatch``, case-sensitively, to the full dotted name: ``"encoder.norm1"``
    does not select ``encoder.norm10``. A class selects its instances and those of its subclasses.
    Names are those without wrappers (``torch.compile``, activation checkpointing, DDP, FSDP), and a
    shared module is found under each of its names. ``model`` itself has no name, so that only a class
    can select it.

    Args:
        model: The module to search.
        selectors: Patterns and classes; a single one may stand alone.
        argument: Name of the user's setting, for the errors.

    Returns:
        Modules in the order of ``named_modules``, each object once, under its first name.

    Raises:
        SettingTypeError: If an item is neither a string nor a class.
        UnmatchedPatternError: If an item selects nothing; also if the model is empty.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.LayerNorm(2))
        >>> list(select_modules(model, ["2", nn.Linear], argument="modules"))
        ['0', '2']
    """
    items = _as_items(selectors, argument)
    named = named_inner_modules(model)
    selected = {id(module) for item in items for module in _matches(item, named, model, argument)}
    first_names: dict[int, str] = {}
    for name, module in named.items():
        first_names.setdefault(id(module), name)
    return {name: named[name] for key, name in first_names.items() if key in selected}


def _as_items(selectors: Selector | Iterable[Selector], argument: str) -> list[Selector]:
    if isinstance(selectors, (str, type)):
        return [selectors]
    if not isinstance(selectors, Iterable):
        raise SettingTypeError(
            f"{argument}={selectors!r} has type {type(selectors).__name__}. "
            "Pass dotted-name patterns and module classes."
        )
    items = list(selectors)
    for item in items:
        _check_item(item, argument)
    return items


def _check_item(item: object, argument: str) -> None:
    if isinstance(item, nn.Module):
        raise SettingTypeError(
            f"{argument}: found a {type(item).__name__} object. Pass its class or the pattern of its dotted name."
        )
    if not isinstance(item, (str, type)):
        raise SettingTypeError(
            f"{argument}: {item!r} has type {type(item).__name__}. Pass dotted-name patterns and module classes."
        )


def _matches(item: Selector, named: dict[str, nn.Module], model: nn.Module, argument: str) -> list[nn.Module]:
    if isinstance(item, str):
        found = [module for name, module in named.items() if name and fnmatch.fnmatchcase(name, item)]
    else:
        found = [module for module in named.values() if isinstance(module, item)]
    if not found:
        raise UnmatchedPatternError(_unmatched_text(item, named, model, argument))
    return found


def _unmatched_text(item: Selector, named: dict[str, nn.Module], model: nn.Module, argument: str) -> str:
    owner = type(named.get("", model)).__name__
    if isinstance(item, str):
        rule, kind, wanted = "Patterns are matched to the full dotted name", "names", item
        candidates = [name for name in named if name]
    else:
        rule, kind, wanted = "Classes are matched with isinstance", "classes", item.__name__
        candidates = list(dict.fromkeys(type(module).__name__ for module in named.values()))
    found = repr(item) if isinstance(item, str) else f"class {wanted}"
    advice = _class_advice(item, named) if isinstance(item, str) else ""
    if not advice:
        nearest = _nearest(wanted, candidates)
        advice = f"Nearest {kind}: {', '.join(nearest)}." if nearest else "It has no modules inside."
    return f"{argument}: {found} matches no module of {owner}. {rule}. {advice}"


def _class_advice(item: str, named: dict[str, nn.Module]) -> str:
    """Say what to write where text names a class of the model, as ``"torch.nn.Linear"`` in YAML does."""
    wanted = item.rpartition(".")[2]
    names = [name for name, module in named.items() if name and wanted in {c.__name__ for c in type(module).__mro__}]
    if not names:
        return ""
    more = f" and {len(names) - _MAX_NEAREST} more" if len(names) > _MAX_NEAREST else ""
    return (
        f"{wanted} is a class: pass the class itself, or, where only text can be given (YAML, a command line), "
        f"patterns for the names of its modules: {', '.join(names[:_MAX_NEAREST])}{more}."
    )


def _nearest(wanted: str, candidates: list[str]) -> list[str]:
    """Return the most similar names, those that end in ``wanted`` first: a prefix is often forgotten."""
    ending = fnmatch.filter(candidates, f"*.{wanted}")
    # cutoff=0: however far, the nearest names show what names look like in this model.
    similar = difflib.get_close_matches(wanted, candidates, n=_MAX_NEAREST, cutoff=0.0)
    return list(dict.fromkeys([*ending, *similar]))[:_MAX_NEAREST]


def is_normalization(module: nn.Module) -> bool:
    """Tell whether ``module`` is a normalization layer, of torch or of a library that names it so.

    A class outside torch counts when its name ends in "Norm", with "1d" to "3d" perhaps, and none of
    its own parameters has more than one dimension that is not 1.

    Example:
        >>> is_normalization(nn.BatchNorm2d(4)), is_normalization(nn.Linear(4, 4))
        (True, False)
    """
    if isinstance(module, _NORMS):
        return True
    if _NORM_NAME.search(type(module).__name__) is None:
        return False
    return all(_is_per_channel(param) for param in module.parameters(recurse=False))


def _is_per_channel(param: nn.Parameter) -> bool:
    return not is_lazy(param) and sum(size != 1 for size in param.shape) <= 1


def is_transposed_linear(module: nn.Module) -> bool:
    """Tell whether this is the ``Conv1D`` of Hugging Face's GPT-2, a linear layer whose weight is transposed."""
    # Without an import of the library: who has such a layer has imported it.
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return isinstance(found, type) and isinstance(module, found)
