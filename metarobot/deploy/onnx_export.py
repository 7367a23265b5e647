"""Export a trained agent to a policy folder: an ONNX model, its metadata, and a parity check.

One step of the agent becomes a function without hidden state. Its inputs are the fields of
``metarobot.types.Percept``, the agent's context, and exploration noise; its outputs are the action
and the context after the step. All are float32 with a leading axis of 1, in physical units: the
observation normaliser is inside the model.

==============  ==================  ==============================================================
ONNX input      field of Percept    shape
==============  ==================  ==============================================================
``obs``         ``obs``             ``(1, obs)``
``action_in``   ``action``          ``(1, act)``
``reward_in``   ``reward``          ``(1, 1)``; ``(1,)`` in ``Percept``
``done_in``     ``done``            ``(1, 1)``; ``(1,)`` in ``Percept``
``first_in``    ``first``           ``(1, 1)``; ``(1,)`` in ``Percept``
``NAME_in``     (context)           ``(1, ...)``, one for each tensor of the context
``noise_in``    (argument of act)   ``(1, noise)``, only for agents that explore
==============  ==================  ==============================================================

An input that the agent does not read is left out of the model. The outputs are ``actions`` and
``NAME_out`` for each tensor of the context that acting changes.

The metadata of the ONNX file and ``policy.json`` hold the keys that mjlab's robots read
(https://github.com/mujocolab/mjlab), at full precision, and what a trial is.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metarobot.bridge.policy.metadata import (
    FORMAT,
    HASH_KEY,
    KIND,
    METADATA_FILE,
    MODEL_FILE,
    content_digest,
    model_properties,
)
from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.files import atomic_folder, write_json
from metarobot.learning.agent_interface import Context, DrawsNoise, NamesContext, agents
from metarobot.learning.meta_gradient import loop_over_tasks
from metarobot.tasks.family import Family, Hardware
from metarobot.training.collect import collect
from metarobot.training.run_folder import PRETRAINED_FOLDER, Run
from metarobot.types import Percept, Rollout

try:
    import onnx

    from metarobot.bridge.policy.onnx_policy import OnnxPolicy
except ImportError as e:
    raise MetarobotError("exporting needs packages: pip install 'metarobot[deploy]'") from e

TOLERANCE = 1e-5
"""Largest difference of an action between torch's agent and the exported one."""
VERSIONED_PACKAGES = ("metarobot", "torch", "onnx", "onnxscript", "onnxruntime", "mujoco")
"""Packages whose versions are written to ``policy.json``."""


class ExportError(MetarobotError):
    """An agent that cannot be exported, or whose export does not act as it does."""


class AgentStep(nn.Module):
    """One step of an agent as a function of float32 tensors ``(1, ...)`` alone.

    Args:
        agent: The trained agent.
        context: Its context at a trial's start.
        inputs: Example inputs by ONNX name, in the order of the model's inputs: the percept, the
            context, and ``noise_in`` if the agent explores.
    """

    def __init__(self, agent: Any, context: Context, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.agent = agent
        self.context_dtypes = [tensor.dtype for tensor in context]
        self.explores = "noise_in" in inputs

        percept = percept_from_inputs(
            inputs["obs"],
            inputs["action_in"],
            inputs["reward_in"],
            inputs["done_in"],
            inputs["first_in"],
        )
        _, after = agent.act(percept, context, inputs.get("noise_in"))
        # an agent that leaves a tensor of its context alone returns that very tensor
        pairs = zip(after, context, strict=True)
        self.changes = [i for i, (new, old) in enumerate(pairs) if new is not old]
        """Indices of the context's tensors that acting changes."""

    def forward(
        self,
        obs: Tensor,
        action: Tensor,
        reward: Tensor,
        done: Tensor,
        first: Tensor,
        *context_and_noise: Tensor,
    ) -> Any:
        """Act; return the action and the tensors of the context that have changed."""
        # noise, if any, comes last and has no dtype here: the shorter list ends the context
        pairs = zip(context_and_noise, self.context_dtypes, strict=False)
        context = tuple(tensor.to(dtype) for tensor, dtype in pairs)
        noise = context_and_noise[-1] if self.explores else None

        percept = percept_from_inputs(obs, action, reward, done, first)
        chosen, after = self.agent.act(percept, context, noise)
        return (chosen, *(after[i].float() for i in self.changes))


def percept_from_inputs(
    obs: Tensor, action: Tensor, reward: Tensor, done: Tensor, first: Tensor
) -> Percept:
    """Build the percept of the ONNX inputs; the table above gives their correspondence."""
    return Percept(obs=obs, action=action, reward=reward[:, 0], done=done[:, 0], first=first[:, 0])


class ParityCheck:
    """An agent made of two, torch's and the exported one, which must act alike.

    Both get the same percepts; ``exported_leads`` says whose action is sent. It has the methods of
    ``Agent``, so that ``collect`` can run it.
    """

    privileged = False

    def __init__(self, agent: Any, policy: OnnxPolicy, *, exported_leads: bool) -> None:
        self.agent = agent
        self.policy = policy
        self.exported_leads = exported_leads
        self.explores = bool(agent.explores)
        self.noise_dim = policy.meta.noise or len(policy.meta.action.names)
        self.steps = 0
        """Steps taken."""
        self.largest = 0.0
        """Largest difference of an action."""
        self.learned = False
        """Whether the context ever changed between episodes."""

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Begin a trial with both; the context is that of torch's agent."""
        self.policy.begin()
        context: Context = self.agent.begin(worlds)
        return context

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Choose an action with both.

        Raises:
            ExportError: The two actions differ by more than ``TOLERANCE``.
        """
        chosen, after = self.agent.act(percept, context, noise)
        self.policy.act(
            percept.obs[0].numpy(),
            float(percept.reward[0]),
            bool(percept.done[0]),
            None if noise is None else noise[0].numpy(),
        )
        exported = torch.from_numpy(self.policy.chosen.copy())[None]

        difference = float((exported - chosen).abs().max())
        # not "difference > TOLERANCE": NaN must be refused too
        if not difference <= TOLERANCE:
            raise ExportError(
                f"the exported agent's action differs from torch's by {difference:.2g} "
                f"at step {self.steps} of a trial, more than {TOLERANCE:g}: nothing was exported"
            )
        self.steps += 1
        self.largest = max(self.largest, difference)
        return (exported if self.exported_leads else chosen), after

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Adapt torch's agent; the exported one adopts its context, as it will on the robot."""
        after: Context = self.agent.adapt(context, episode)
        pairs = zip(after, context, strict=True)
        if not all(new is old or torch.equal(new, old) for new, old in pairs):
            self.learned = True
            named = zip(self.policy.meta.context, after, strict=True)
            self.policy.set_context({tensor.name: value.numpy() for tensor, value in named})
        return after


@dataclass(frozen=True)
class ParityResult:
    """Result of a parity check."""

    report: dict[str, Any]
    """Its entry in ``policy.json``."""
    learned: bool
    """Whether the agent's context ever changed between episodes."""


def parity(
    agent: Any,
    policy: OnnxPolicy,
    family: Family,
    *,
    tasks: int,
    seed: int,
    tick: Callable[[], None],
) -> ParityResult:
    """Run whole trials with torch's agent and the exported one side by side.

    Args:
        agent: Torch's agent.
        policy: The exported one.
        family: Task family of the trials.
        tasks: Training tasks to draw; each is run twice, led by either agent.
        seed: Draws tasks, initial states and noise.
        tick: Called after each trial.

    Raises:
        ExportError: An action differs by more than ``TOLERANCE``, or ``tasks`` is below 1.
    """
    if tasks < 1:
        raise ExportError(f"tasks must be at least 1, not {tasks}")
    drawn = family.space.sample("train", tasks, seed)
    episodes = policy.meta.trial.episodes
    env = Env(family, drawn[:1], threads=1)

    steps = 0
    largest = 0.0
    learned = False
    for task, exported_leads in itertools.product(drawn, (False, True)):
        both = ParityCheck(agent, policy, exported_leads=exported_leads)
        collect(both, env, [task], episodes=episodes, seed=seed, explore=both.explores)
        steps += both.steps
        largest = max(largest, both.largest)
        learned = learned or both.learned
        tick()

    report = {
        "tolerance": TOLERANCE,
        "difference": largest,
        "steps": steps,
        "tasks": tasks,
        "seed": seed,
    }
    return ParityResult(report, learned)


def count_export_trials(tasks: int) -> int:
    """Return how often ``export`` calls ``tick``: for the conversion, and for each trial."""
    return 1 + 2 * tasks


def export(
    run: Run, out: Path, *, tasks: int = 3, seed: int = 0, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write a run's agent to a policy folder, and return its metadata.

    The folder appears once everything is written and checked; a policy folder of that name is
    replaced.

    Args:
        run: The trained run.
        out: Folder to write.
        tasks: Tasks of the parity check.
        seed: Draws the parity check's tasks, initial states and noise.
        tick: Called ``count_export_trials(tasks)`` times.

    Raises:
        ExportError: ``out`` is something else than a policy folder, the agent is an oracle or has
            no ONNX form, or the exported agent does not act as torch's does.
    """
    if out.exists() and not (out / METADATA_FILE).exists():
        is_empty_folder = out.is_dir() and not any(out.iterdir())
        if not is_empty_folder:
            raise ExportError(f"{out} exists and is no policy folder: choose another --out")
    agent = run.load_agent()
    if agent.privileged:
        raise ExportError(f"{run.name} is an oracle: it is shown the task, which no robot can be")

    meta = describe(run, agent)
    with atomic_folder(out) as folder, torch.no_grad():
        model, meta = convert(agent, meta)
        tick()
        _write(folder, model, meta)

        # the check runs the files as a robot will load them
        policy = OnnxPolicy.load(folder, trial=False)
        result = parity(agent, policy, run.family, tasks=tasks, seed=seed, tick=tick)

        # an agent that imitates learns from demonstrations, which a robot does not have
        if result.learned and not agents.get(run.agent).imitates:
            meta["adapts"] = "between"
        meta["parity"] = result.report
        _write(folder, model, meta)
    return meta


def describe(run: Run, agent: Any) -> dict[str, Any]:
    """Return the metadata that do not depend on the ONNX model: family, robot and trial."""
    family = run.family
    env = Env(family, family.space.sample("train", 1), threads=1)
    hardware = None if family.deployment.hardware is None else family.deployment.hardware()

    reward = None
    if hardware is not None and hardware.reward:
        reward = {**hardware.reward, "weights": dict(family.weights)}
    noise = 0
    if agent.explores:
        noise = int(agent.noise_dim) if isinstance(agent, DrawsNoise) else env.act_dim

    return {
        "format": FORMAT,
        "kind": KIND,
        "agent": run.agent,
        "family": family.name,
        "run_path": _public_run_path(run),
        "versions": {name: version(name) for name in VERSIONED_PACKAGES},
        **_describe_joints(hardware),
        "observation_names": list(family.observations),
        "control_hz": round(env.control_hz, 9),
        "trial": {
            "horizon": family.horizon,
            "episodes": run.agent_config.episodes,
            "rollouts": run.rollouts,
        },
        "action": {
            "names": list(env.action_names),
            "low": env.action_low.tolist(),
            "high": env.action_high.tolist(),
        },
        "layout": "direct" if hardware is None else "legged",
        "reward": reward,
        "explores": bool(agent.explores),
        "noise": noise,
    }


def _public_run_path(run: Run) -> str:
    """Return where the run folder is, from the working folder, without names of this machine.

    It is the folder's name alone for an agent in the box, which is found by it, and for a run
    outside the working folder, which ``metarobot run`` must be given as ``--run``. So it is where
    the working folder lies above the home folder: the path would name the user.
    """
    folder = run.folder.resolve()
    is_near = folder.is_relative_to(Path.cwd()) and Path.cwd() not in Path.home().parents
    if run.folder.parent == PRETRAINED_FOLDER or not is_near:
        return str(run.name)
    return str(folder.relative_to(Path.cwd()))


def _describe_joints(hardware: Hardware | None) -> dict[str, Any]:
    """Return the metadata of joints; all are empty for a robot without declared hardware."""
    if hardware is None:
        return {
            "joint_names": [],
            "joint_stiffness": [],
            "joint_damping": [],
            "default_joint_pos": [],
            "action_scale": [],
            "command_names": [],
            "limits": {},
        }
    limits = {}
    for i, joint in enumerate(hardware.joints):
        low, high = hardware.position[i]
        limits[joint] = {
            "low": low,
            "high": high,
            "velocity": hardware.velocity[i],
            "torque": hardware.torque[i],
        }
    return {
        "joint_names": list(hardware.joints),
        "joint_stiffness": list(hardware.stiffness),
        "joint_damping": list(hardware.damping),
        "default_joint_pos": list(hardware.pose),
        "action_scale": list(hardware.scale),
        "command_names": list(hardware.commands),
        "limits": limits,
    }


def convert(agent: Any, meta: dict[str, Any]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Convert an agent's step to ONNX; return the model, and the metadata completed by it.

    Added are ``adapts``, ``inputs``, ``outputs`` and ``context``.

    Raises:
        ExportError: The step has no ONNX form.
    """
    context = tuple(tensor.detach().clone() for tensor in agent.begin(1))
    names = context_names(agent, len(context))

    # the order of the inputs is that of AgentStep.forward
    inputs = {
        "obs": torch.zeros(1, len(meta["observation_names"])),
        "action_in": torch.zeros(1, len(meta["action"]["names"])),
        "reward_in": torch.zeros(1, 1),
        "done_in": torch.zeros(1, 1),
        "first_in": torch.zeros(1, 1),
    }
    for name, tensor in zip(names, context, strict=True):
        inputs[f"{name}_in"] = tensor.float()
    if meta["noise"]:
        inputs["noise_in"] = torch.zeros(1, meta["noise"])

    step = AgentStep(agent, context, inputs)
    outputs = {"actions": inputs["action_in"]}
    for i in step.changes:
        outputs[f"{names[i]}_out"] = context[i]

    model = _export_onnx(step, inputs, list(outputs))
    read = _remove_unread_inputs(model)
    _remove_notes(model)

    entries = []
    for name, tensor in zip(names, context, strict=True):
        entry = {
            "name": name,
            "in": f"{name}_in" if f"{name}_in" in read else None,
            "out": f"{name}_out" if f"{name}_out" in outputs else None,
            "shape": list(tensor.shape),
            "begin": tensor.float().tolist() if bool(tensor.any()) else "zeros",
        }
        entries.append(entry)
    completed = {
        **meta,
        "adapts": "acting" if step.changes else "none",
        "inputs": _names_and_shapes({name: inputs[name] for name in read}),
        "outputs": _names_and_shapes(outputs),
        "context": entries,
    }
    return model, completed


def _names_and_shapes(tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    return [{"name": name, "shape": list(x.shape)} for name, x in tensors.items()]


def context_names(agent: Any, count: int) -> list[str]:
    """Return names of an agent's ``count`` context tensors.

    An agent may declare them (``NamesContext``). Else one or two are ``h`` and ``c``, as of an
    LSTM, and more are numbered.
    """
    if isinstance(agent, NamesContext):
        names = list(agent.context_names)
    elif count <= 2:
        names = ["h", "c"]
    else:
        names = [f"context_{i}" for i in range(count)]
    return names[:count]


def _export_onnx(
    step: AgentStep, inputs: dict[str, Tensor], output_names: list[str]
) -> onnx.ModelProto:
    """Run torch's exporter without its warnings and log."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # the exporter's tracer does not know vmap, which agents with one set of weights a task use
        with warnings.catch_warnings(), loop_over_tasks():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                step.eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=output_names,
                external_data=False,
                verbose=False,
            )
    except Exception as e:  # the exporter raises many types for what ONNX cannot express
        message = " ".join(str(e).split())[:200]
        raise ExportError(f"this agent's step has no ONNX form: {message}") from e
    finally:
        logger.setLevel(level)
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def _remove_unread_inputs(model: onnx.ModelProto) -> list[str]:
    """Remove the inputs that no node reads; return the names of the others."""
    read = {name for node in model.graph.node for name in node.input}
    # an input may be passed through as an output
    read |= {output.name for output in model.graph.output}
    kept = [graph_input for graph_input in model.graph.input if graph_input.name in read]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return [graph_input.name for graph_input in kept]


def _write(folder: Path, model: onnx.ModelProto, meta: dict[str, Any]) -> None:
    """Write model and metadata; ``policy.json`` holds the SHA-256 of the model and of itself."""
    onnx.helper.set_model_props(model, model_properties(meta))
    data = model.SerializeToString(deterministic=True)
    complete = {**meta, "sha256": hashlib.sha256(data).hexdigest()}
    complete[HASH_KEY] = content_digest(complete)
    (folder / MODEL_FILE).write_bytes(data)
    write_json(folder / METADATA_FILE, complete)


def _remove_notes(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes, which tell where on this machine the agent's code stands."""
    graph = model.graph
    for message in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del message.metadata_props[:]
    for message in (model, graph, *graph.node, *graph.value_info, *graph.initializer):
        message.ClearField("doc_string")
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
