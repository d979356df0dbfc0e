"""Packages that only some jobs need: extras of the installed package, all of them in requirements.txt."""

import importlib
from types import ModuleType


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of a package that the base installation leaves out.

    Raises ImportError that names the package and the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:  # the package is there, and something that it needs is not
            raise
        raise ImportError(
            f"{package} is not installed: pip install 'cooper-jax[{extra}]', or in a checkout "
            "pip install -r requirements.txt",
            name=package,
        ) from error
