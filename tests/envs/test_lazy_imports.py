"""Families are listed and described without waiting for PyTorch."""

import subprocess
import sys

import pytest

from metarobot.lazy import lazy_module

DESCRIBE_ALL = """
import sys
from metarobot.tasks.family import families
for name in families.names():
    family = families.get(name)
    assert family.doc
    assert family.space.describe()
assert "torch" not in sys.modules
"""


def test_describing_every_family_does_not_import_torch() -> None:
    done = subprocess.run([sys.executable, "-c", DESCRIBE_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_lazy_module_is_imported_at_its_first_use_and_keeps_attributes() -> None:
    module = lazy_module("colorsys")
    sys.modules.pop("colorsys", None)
    assert "colorsys" not in sys.modules
    assert module.rgb_to_hsv(1.0, 1.0, 1.0) == (0.0, 0.0, 1.0)
    assert "colorsys" in sys.modules
    assert vars(module)["rgb_to_hsv"] is sys.modules["colorsys"].rgb_to_hsv


def test_a_lazy_module_that_does_not_exist_fails_at_its_first_use() -> None:
    module = lazy_module("metarobot_nonsense")
    with pytest.raises(ImportError, match="metarobot_nonsense"):
        module.anything()
