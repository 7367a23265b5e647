"""The family that ``docs/families.md`` builds: it runs as written, and agents learn on it."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import tiny_run

from metarobot.env.base import Env
from metarobot.registry import RegistryError
from metarobot.tasks.family import Family, families

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The first block of Python on the page, imported as a file once."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    path = tmp_path_factory.mktemp("my_package") / "pendulum.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("pendulum", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_is_registered_under_its_name(example: ModuleType) -> None:
    family: Family = families.get("PendulumHidden")
    assert family is example.pendulum
    with pytest.raises(RegistryError, match="'PendulumHidden' is registered already"):
        families.register(family.name, family)


def test_the_example_uses_required_fields_alone_and_the_page_explains_them_all() -> None:
    text = PAGE.read_text()
    required = text.split("## The eleven required fields")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", required, re.MULTILINE)
    fields = Family.__dataclass_fields__
    groups = ["interaction", "teaching", "display", "deployment"]
    assert named == [name for name in fields if name not in groups]
    assert len(named) == 11
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0].split("pendulum = Family(")[1]
    assert re.findall(r"^    (\w+)=", block, re.MULTILINE) == named

    optional = text.split("## The four optional groups")[1].split("\n## ")[0]
    explained = set(re.findall(r"^\|.*?\| `(\w+)` \|", optional, re.MULTILINE))
    assert explained == {
        name for group in groups for name in fields[group].default.__dataclass_fields__
    }


def test_what_is_hidden_changes_the_motion_and_is_not_observed(example: ModuleType) -> None:
    family = example.pendulum
    nominal = {"mass": 0.5, "friction": 0.05, "motor": 1.0}
    changes = ({}, {"mass": 1.0}, {"friction": 0.2}, {"motor": -1.0})
    env = Env(family, [{**nominal, **change} for change in changes], threads=1)
    hanging = torch.full((4, 1), torch.pi).double()
    env.set_state(hanging, torch.zeros_like(hanging))
    step = env.step(torch.full((4, 1), 0.5))
    velocity = step.obs[:, 2]
    assert velocity[0] > velocity[1] > 0, "a heavy bob moves less"
    assert velocity[0] > velocity[2] > 0, "and so does one with friction"
    assert velocity[3] < 0, "a reversed motor turns it the other way"
    assert step.obs.shape == (4, len(family.observations))
    assert step.terms.keys() == family.weights.keys()
    assert ((step.terms["upright"] >= 0) & (step.terms["upright"] <= 1)).all()


@pytest.mark.parametrize("agent", ["ppo", "rl2"])
def test_agents_train_on_the_example(example: ModuleType, agent: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / agent, agent, example.pendulum.name, steps=1600)
    metrics = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) >= 2
    assert run.family is example.pendulum
