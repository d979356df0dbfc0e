"""Marks by compiler: `-m tpu` and `-m cuda` choose what an environment can compile."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda if "h100" in item.nodeid else pytest.mark.tpu)
