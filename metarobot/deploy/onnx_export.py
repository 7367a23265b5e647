"""From a trained agent to a policy folder: ONNX with explicit state, JSON, and a check that both
bodies act alike.

The model's inputs are what a percept holds, in physical units, and the agent's context; its outputs
are the action and the context after it. What the agent does not read is no input. The metadata of
the file and ``policy.json`` hold the keys that mjlab's robots read
(https://github.com/mujocolab/mjlab), at full precision, and what a trial is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metarobot.bridge.policy.metadata import ABOUT, FORMAT, KIND, MODEL
from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.files import atomic_folder, write_json
from metarobot.learning.agent_interface import Context, agents
from metarobot.learning.meta_gradient import loop_over_tasks
from metarobot.tasks.family import Family, Hardware
from metarobot.training.collect import collect
from metarobot.training.run_folder import PRETRAINED_FOLDER, Run
from metarobot.types import Percept, Rollout

try:
    import onnx

    from metarobot.bridge.policy.onnx_policy import Policy
except ImportError as e:
    raise MetarobotError("exporting needs packages: pip install 'metarobot[deploy]'") from e

TOLERANCE = 1e-5
"""Largest difference of an action between torch's agent and the exported one."""


class ExportError(MetarobotError):
    """An agent that cannot be exported, or whose export does not act as it does."""


class AgentStep(nn.Module):
    """One step of an agent as a function of tensors alone, each ``(1, ...)`` and float32."""

    def __init__(self, agent: Any, context: Context, given: dict[str, Tensor]) -> None:
        super().__init__()
        self.agent, self.kinds, self.noisy = agent, [c.dtype for c in context], "noise_in" in given
        shown, noise = list(given.values()), given.get("noise_in")
        _, after = agent.act(_percept(*shown[:5]), context, noise)
        self.changes = [
            i for i, (a, b) in enumerate(zip(after, context, strict=True)) if a is not b
        ]
        """Which tensors of the context acting changes."""

    def forward(
        self,
        obs: Tensor,
        action: Tensor,
        reward: Tensor,
        done: Tensor,
        first: Tensor,
        *rest: Tensor,
    ) -> Any:
        """Act; return the action and what of the context has changed."""
        context = tuple(x.to(kind) for x, kind in zip(rest, self.kinds, strict=False))
        noise = rest[-1] if self.noisy else None
        chosen, after = self.agent.act(_percept(obs, action, reward, done, first), context, noise)
        return (chosen, *(after[i].float() for i in self.changes))


def _percept(obs: Tensor, action: Tensor, reward: Tensor, done: Tensor, first: Tensor) -> Percept:
    return Percept(obs, action, reward[:, 0], done[:, 0], first[:, 0])


class ParityCheck:
    """Torch's agent and the exported one, side by side: shown the same, one of them leads."""

    privileged = False

    def __init__(self, agent: Any, policy: Policy, *, exported_leads: bool) -> None:
        self.agent, self.policy, self.exported_leads = agent, policy, exported_leads
        self.explores = bool(agent.explores)
        self.noise_dim = policy.meta.noise or len(policy.meta.action.names)
        self.steps, self.largest = 0, 0.0
        """Steps taken, and the largest difference of an action."""
        self.learned = False
        """Whether anything changed between episodes."""

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Begin both."""
        self.policy.begin()
        context: Context = self.agent.begin(worlds)
        return context

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Let both choose, and raise ``ExportError`` where they are too far apart."""
        chosen, after = self.agent.act(percept, context, noise)
        drawn = None if noise is None else noise[0].numpy()
        self.policy.act(
            percept.obs[0].numpy(), float(percept.reward[0]), bool(percept.done[0]), drawn
        )
        exported = torch.from_numpy(self.policy.chosen.copy())[None]
        apart = float((exported - chosen).abs().max())
        if not apart <= TOLERANCE:
            raise ExportError(
                f"the exported agent's action differs from torch's by {apart:.2g} at step {self.steps} of a trial, "
                f"more than {TOLERANCE:g}: nothing was exported"
            )
        self.steps, self.largest = self.steps + 1, max(self.largest, apart)
        return (exported if self.exported_leads else chosen), after

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Adapt torch's agent; the exported one takes over what it learned, as it will on the
        robot.
        """
        after: Context = self.agent.adapt(context, episode)
        if not all(a is b or torch.equal(a, b) for a, b in zip(after, context, strict=True)):
            self.learned = True
            self.policy.adopt(
                {p.name: x.numpy() for p, x in zip(self.policy.meta.context, after, strict=True)}
            )
        return after


@dataclass(frozen=True)
class Parity:
    """What playing side by side found."""

    report: dict[str, Any]
    learned: bool


def parity(
    agent: Any, policy: Policy, family: Family, *, tasks: int, seed: int, tick: Callable[[], None]
) -> Parity:
    """Play whole trials in each of some tasks, led by torch's agent and then by the exported one.

    Both are shown the same at each step. Raise ``ExportError`` at the first action that differs by
    more than ``TOLERANCE``.
    """
    if tasks < 1:
        raise ExportError(f"tasks must be at least 1, not {tasks}")
    steps, largest, learned = 0, 0.0, False
    drawn, episodes = family.space.sample("train", tasks, seed), policy.meta.trial.episodes
    env = Env(family, drawn[:1], threads=1)
    for task, exported_leads in itertools.product(drawn, (False, True)):
        both = ParityCheck(agent, policy, exported_leads=exported_leads)
        collect(both, env, [task], episodes=episodes, seed=seed, explore=both.explores)
        steps, largest, learned = (
            steps + both.steps,
            max(largest, both.largest),
            learned or both.learned,
        )
        tick()
    report = {
        "tolerance": TOLERANCE,
        "difference": largest,
        "steps": steps,
        "tasks": tasks,
        "seed": seed,
    }
    return Parity(report, learned)


def count_export_trials(tasks: int) -> int:
    """Count the ticks of ``export``: the conversion, and the trials played."""
    return 1 + 2 * tasks


def export(
    run: Run, out: Path, *, tasks: int = 3, seed: int = 0, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write a run's agent to a policy folder; return its metadata.

    The folder takes its place once all is written and checked; one that was there before and holds
    a policy gives way.
    """
    if out.exists() and not (out / ABOUT).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is no policy folder: choose another --out")
    agent = run.load_agent()
    if agent.privileged:
        raise ExportError(f"{run.name} is an oracle: it is shown the task, which no robot can be")
    meta = describe(run, agent)
    with atomic_folder(out) as folder, torch.no_grad():
        model, meta = convert(agent, meta)
        tick()
        _write(folder, model, meta)
        found = parity(agent, Policy.load(folder), run.family, tasks=tasks, seed=seed, tick=tick)
        if (
            found.learned and not agents.get(run.agent).imitates
        ):  # who imitates learns from demonstrations, not here
            meta["adapts"] = "between"
        meta["parity"] = found.report
        _write(folder, model, meta)
    return meta


def describe(run: Run, agent: Any) -> dict[str, Any]:
    """Return what the metadata say of the agent's family, robot and trial."""
    family, env = run.family, Env(run.family, run.family.space.sample("train", 1), threads=1)
    hardware = None if family.deployment.hardware is None else family.deployment.hardware()
    boxed = run.folder.parent == PRETRAINED_FOLDER
    packages = ("metarobot", "torch", "onnx", "onnxscript", "onnxruntime", "mujoco")
    return {
        "format": FORMAT,
        "kind": KIND,
        "agent": run.agent,
        "family": family.name,
        "run_path": run.name if boxed else str(run.folder.resolve()),
        "versions": {name: version(name) for name in packages},
        **_joints(hardware),
        "observation_names": list(family.observations),
        "control_hz": round(env.control_hz, 9),
        "trial": {
            "horizon": family.horizon,
            "episodes": int(run.config["agent_config"]["episodes"]),
            "rollouts": run.rollouts,
        },
        "action": {
            "names": list(env.action_names),
            "low": env.action_low.tolist(),
            "high": env.action_high.tolist(),
        },
        "layout": "direct" if hardware is None else "legged",
        "reward": {**hardware.reward, "weights": dict(family.weights)}
        if hardware and hardware.reward
        else None,
        "explores": bool(agent.explores),
        "noise": int(getattr(agent, "noise_dim", env.act_dim)) if agent.explores else 0,
    }


def _joints(hardware: Hardware | None) -> dict[str, Any]:
    """Return the keys that speak of joints, empty for a robot that is not known."""
    names = (
        "joint_names",
        "joint_stiffness",
        "joint_damping",
        "default_joint_pos",
        "action_scale",
        "command_names",
    )
    if hardware is None:
        return {**{name: [] for name in names}, "limits": {}}
    h = hardware
    told = (h.joints, h.stiffness, h.damping, h.pose, h.scale, h.commands)
    limits = {
        joint: {"low": low, "high": high, "velocity": velocity, "torque": torque}
        for joint, (low, high), velocity, torque in zip(
            h.joints, h.position, h.velocity, h.torque, strict=True
        )
    }
    return {
        **{name: list(values) for name, values in zip(names, told, strict=True)},
        "limits": limits,
    }


def convert(agent: Any, meta: dict[str, Any]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Turn an agent's step into an ONNX model; return it with the metadata, to which inputs and
    outputs are added.
    """
    context = tuple(c.detach().clone() for c in agent.begin(1))
    names, width = context_names(agent, len(context)), meta["noise"]
    given = {"obs": torch.zeros(1, len(meta["observation_names"]))}
    given["action_in"] = torch.zeros(1, len(meta["action"]["names"]))
    given |= {name: torch.zeros(1, 1) for name in ("reward_in", "done_in", "first_in")}
    given |= {f"{name}_in": x.float() for name, x in zip(names, context, strict=True)}
    given |= {"noise_in": torch.zeros(1, width)} if width else {}
    stepper = AgentStep(agent, context, given)
    results = {
        "actions": given["action_in"],
        **{f"{names[i]}_out": context[i] for i in stepper.changes},
    }
    model = _onnx(stepper, given, list(results))
    read = _prune(model)
    parts = [
        {
            "name": name,
            "in": f"{name}_in" if f"{name}_in" in read else None,
            "out": f"{name}_out" if f"{name}_out" in results else None,
            "shape": list(value.shape),
            "begin": value.float().tolist() if bool(value.any()) else "zeros",
        }
        for name, value in zip(names, context, strict=True)
    ]
    adapts = "acting" if stepper.changes else "none"
    inputs, outputs = _shapes({k: given[k] for k in read}), _shapes(results)
    return model, {**meta, "adapts": adapts, "inputs": inputs, "outputs": outputs, "context": parts}


def _shapes(tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    return [{"name": name, "shape": list(x.shape)} for name, x in tensors.items()]


def context_names(agent: Any, count: int) -> list[str]:
    """Name the tensors of an agent's context: as it says itself, h and c, or by their numbers."""
    usual = ("h", "c") if count <= 2 else [f"context_{i}" for i in range(count)]
    return list(getattr(agent, "context_names", usual))[:count]


def _onnx(stepper: AgentStep, given: dict[str, Tensor], outputs: list[str]) -> onnx.ModelProto:
    """Run torch's exporter, which is told to keep its remarks to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), loop_over_tasks():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                stepper.eval(),
                tuple(given.values()),
                input_names=list(given),
                output_names=outputs,
                external_data=False,
                verbose=False,
            )
    except Exception as e:  # whatever an agent's step may hold that ONNX has no word for
        raise ExportError(
            f"this agent's step has no ONNX form: {' '.join(str(e).split())[:200]}"
        ) from e
    finally:
        logger.setLevel(level)
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def _prune(model: onnx.ModelProto) -> list[str]:
    """Leave out the inputs that nothing reads; return the names of the others."""
    used = {name for node in model.graph.node for name in node.input} | {
        o.name for o in model.graph.output
    }
    kept = [i for i in model.graph.input if i.name in used]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return [i.name for i in kept]


def properties(value: Any, key: str = "") -> dict[str, str]:
    """Write metadata as strings: ``trial.horizon`` for what is in a part, comma-separated values
    for lists.
    """
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {part["name"]: {k: v for k, v in part.items() if k != "name"} for part in value}
    if isinstance(value, dict):
        return {
            k: v
            for name, x in value.items()
            for k, v in properties(x, f"{key}.{name}" if key else name).items()
        }
    return {key: ",".join(_words(value))}


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for x in value:
            yield from _words(x)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _write(folder: Path, model: onnx.ModelProto, meta: dict[str, Any]) -> None:
    onnx.helper.set_model_props(model, properties(meta))
    data = model.SerializeToString(deterministic=True)
    (folder / MODEL).write_bytes(data)
    write_json(folder / ABOUT, {**meta, "sha256": hashlib.sha256(data).hexdigest()})
