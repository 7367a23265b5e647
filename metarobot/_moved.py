"""Errors that name the new place of modules that were moved, for one release.

``import metarobot.checkpoint`` raises an ``ImportError`` of one line that names
``metarobot.training.run_folder``. The finder is asked only after all others have found nothing, so
modules that exist never pay for it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

NEW_PLACES = {
    "agent": "learning.agent_interface",
    "agents.critic": "learning.outer_critic",
    "agents.gradient": "learning.maml_agent",
    "agents.posterior": "learning.gaussian_posterior",
    "agents.replay": "learning.trial_replay",
    "agents.sinusoid": "evaluation.sinusoid_example",
    "adapting": "deploy.adaptation_worker",
    "beliefs": "evaluation.belief_calibration",
    "bench_device": "bench.device_speed",
    "bridge.adaptation": "bridge.adaptation_client",
    "bridge.child": "bridge.tools.child_process",
    "bridge.commands": "bridge.safety.command_checks",
    "bridge.dds": "bridge.robots.dds",
    "bridge.direct": "bridge.layouts.named_signals",
    "bridge.gate": "bridge.safety.command_gate",
    "bridge.guard": "bridge.safety.guard_process",
    "bridge.legged": "bridge.layouts.legged",
    "bridge.lerobot": "bridge.robots.lerobot",
    "bridge.log": "bridge.tools.run_log",
    "bridge.meta": "bridge.policy.metadata",
    "bridge.odometry": "bridge.layouts.leg_odometry",
    "bridge.onnxfile": "bridge.policy.onnx_file_check",
    "bridge.options": "bridge.run_options",
    "bridge.pace": "bridge.loop_timing",
    "bridge.panel": "bridge.tools.terminal_panel",
    "bridge.readings": "bridge.safety.reading_checks",
    "bridge.replay": "bridge.tools.replay_log",
    "bridge.robot": "bridge.robot_interface",
    "bridge.ros2": "bridge.robots.ros2",
    "bridge.ros2_idl": "bridge.robots.ros2_messages",
    "bridge.run": "bridge.launch",
    "bridge.session": "bridge.run_report",
    "bridge.sim": "bridge.robots.sim_client",
    "bridge.states": "bridge.state_machine",
    "bridge.stop": "bridge.safety.emergency_stop",
    "bridge.unitree": "bridge.robots.unitree",
    "bridge.unitree_idl": "bridge.robots.unitree_messages",
    "bridge.wired": "bridge.robots.dds_robot",
    "checkpoint": "training.run_folder",
    "cli_compare": "cli.comparison",
    "cli_demos": "cli.demonstrations",
    "cli_likeness": "cli.evaluation",
    "cli_robot": "cli.robot",
    "collect": "training.collect",
    "compare": "evaluation.compare",
    "demos": "training.demonstrations",
    "device": "env.device",
    "distributions": "tasks.distributions",
    "envs.arms": "envs.robots.panda_variants",
    "envs.go2": "envs.robots.go2",
    "envs.manipulation": "envs.robots.arm_control",
    "envs.models": "envs.robots.model_files",
    "envs.objects": "envs.scenery.graspable_objects",
    "envs.panda": "envs.robots.panda",
    "envs.params": "envs.dynamics_params",
    "envs.rotation": "envs.robots.quaternions",
    "envs.terrain": "envs.scenery.terrain",
    "evaluate": "evaluation.evaluate",
    "export": "deploy.onnx_export",
    "family": "tasks.family",
    "gym": "env.gymnasium_envs",
    "inner": "learning.meta_gradient",
    "likeness": "evaluation.task_recognition",
    "log": "training.metrics_log",
    "metric": "learning.metric_losses",
    "model": "tasks.model_edits",
    "nets": "learning.networks",
    "overlay": "render.frame_layout",
    "parallel": "threads_and_memory",
    "plot": "evaluation.plots",
    "progress": "cli.progress",
    "returns": "learning.returns",
    "sb3": "env.sb3_vec_env",
    "sb3_agents": "agents.sb3.algorithms",
    "sb3_policies": "agents.sb3.policies",
    "sb3_trials": "agents.sb3.trial_envs",
    "scan": "learning.linear_recurrence",
    "scan_kernels": "learning.linear_recurrence_kernels",
    "shots": "evaluation.few_shot_imitation",
    "simrobot": "deploy.sim_robot_server",
    "simworld": "deploy.sim_robot_body",
    "stats": "evaluation.statistics",
    "studio": "render.scene",
    "tables": "evaluation.tables",
    "train": "training.train",
    "trust": "learning.trust_region",
    "video": "render.film",
    "worlds": "training.task_sampling",
}
"""Old module -> new module, both without ``metarobot.``."""

PACKAGE = "metarobot."


class MovedModuleFinder(MetaPathFinder):
    """Finds no module; raises for those that were moved."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None, or raise for a module that was moved."""
        if fullname.startswith(PACKAGE):
            old = fullname.removeprefix(PACKAGE)
            if old in NEW_PLACES:
                _raise_moved(fullname, PACKAGE + NEW_PLACES[old])
        return None


def _raise_moved(old: str, new: str) -> NoReturn:
    raise ImportError(f"{old} is {new} now: import from there", name=old)


def moved_names(package: str, new: str, **renamed: str) -> Callable[[str], NoReturn]:
    """Return the ``__getattr__`` of a package whose name was that of a module.

    Names of that module raise an ``ImportError`` of one line that names the module where they are.

    Args:
        package: The package.
        new: Where the module's contents are now.
        renamed: Names that changed, old=new.
    """

    def explain(name: str) -> NoReturn:
        new_name = renamed.get(name, name)
        if not name.startswith("__") and hasattr(importlib.import_module(new), new_name):
            raise ImportError(f"{package}.{name} is {new}.{new_name} now: import it from there")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return explain


def install() -> None:
    """Let the import system ask this finder last."""
    if not any(isinstance(finder, MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedModuleFinder())
