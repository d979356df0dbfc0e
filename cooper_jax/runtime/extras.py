"""Import of optional packages, which only some jobs need (the extras of the installed package)."""

import importlib
from types import ModuleType


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of a package that the base installation does not include.

    Raises ImportError, naming the package and the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # If another module is missing, the package is installed, but one of its dependencies is not.
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise ImportError(
            f"{package} is not installed: pip install 'cooper-jax[{extra}]'", name=package
        ) from error
