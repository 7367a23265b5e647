import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import collect_trials

from metarobot.bridge.adaptation_client import (
    DEFAULT_KL_BOUND,
    AdaptationClient,
    AdaptationResult,
    write_npz,
)
from metarobot.bridge.errors import BridgeError
from metarobot.deploy import adaptation_worker as adapting
from metarobot.errors import MetarobotError
from metarobot.training.run_folder import Run, open_run
from metarobot.types import Rollout

WIDE = 1e4
"""A bound that a step on a few short rollouts does not reach."""
IN_TIME = ("obs", "action", "reward", "terminated", "truncated", "valid")


def meta(run: Run, size: int, horizon: int = 12) -> Any:
    """What a client asks of a policy's metadata."""
    return SimpleNamespace(
        agent=run.agent,
        adapts="between",
        run_path=str(run.folder),
        trial=SimpleNamespace(horizon=horizon, episodes=2, rollouts=20),
        observation_names=[f"obs_{i}" for i in range(17)],
        action=SimpleNamespace(names=[f"act_{i}" for i in range(6)]),
        context=[SimpleNamespace(name="weights", shape=(1, size))],
    )


@pytest.fixture(scope="module")
def run() -> Run:
    return open_run("CheetahDir100-promp")


@pytest.fixture(scope="module")
def agent(run: Run) -> Any:
    return run.load_agent()


@pytest.fixture(scope="module")
def episode(agent: Any) -> Rollout:
    """Rollouts of one task, some of which end early."""
    both = collect_trials(agent, episodes=1).episodes[0]
    half = both.reward.shape[1] // 2
    assert not both.valid[:, :half].all()
    rows = {k: getattr(both, k)[:, :half] for k in (*IN_TIME, "critic_obs", "teacher_action")}
    return replace(
        both,
        **rows,
        **{k: getattr(both, k)[:half] for k in ("final_obs", "final_critic_obs", "faulted")},
    )


def recorded(client: AdaptationClient, episode: Rollout) -> AdaptationClient:
    """Write rollouts down as a controller does, one after the other."""
    for i in range(episode.reward.shape[1]):
        steps = int(episode.valid[:, i].sum())
        for t in range(steps):
            client.step(
                episode.obs[t, i].numpy(), episode.action[t, i].numpy(), float(episode.reward[t, i])
            )
        client.end(episode.final_obs[i].numpy(), failed=bool(episode.terminated[:, i].any()))
    return client


def outcome(client: AdaptationClient, seconds: float = 300.0) -> AdaptationResult:
    end = time.monotonic() + seconds
    while (found := client.poll()) is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def log(agent: Any, episode: Rollout, **changes: Any) -> dict[str, Any]:
    arrays = {k: getattr(episode, k).numpy() for k in (*IN_TIME, "final_obs")}
    return arrays | {"context_0": agent.begin(1)[0].numpy()} | changes


def test_in_its_process_it_comes_to_what_the_agent_comes_to(
    run: Run, agent: Any, episode: Rollout
) -> None:
    client = AdaptationClient(
        meta(run, agent.weight_count, len(episode.reward)),
        rollouts=episode.reward.shape[1],
        kl=WIDE,
        deadline_s=300,
    )
    recorded(client, episode)
    assert client.ready
    client.start({"weights": agent.begin(1)[0].numpy()})
    assert (client.collected, client.busy) == (0, True)  # the next episodes are collected meanwhile
    found = outcome(client)
    assert not client.busy
    assert found.context is not None, found.reason
    (wanted,) = agent.adapt(agent.begin(1), episode)
    assert np.array_equal(found.context["weights"], wanted.numpy())
    assert found.reason == ""
    assert 0 < found.kl < WIDE
    assert found.kl == pytest.approx(adapting.divergence(agent, agent.begin(1), (wanted,), episode))


def test_the_divergence_is_that_of_two_gaussians(agent: Any, episode: Rollout) -> None:
    old, new = agent.begin(1), tuple(x + 0.01 for x in agent.begin(1))
    x = agent.norm(episode.obs[episode.valid])[None]
    (m0, s0), (m1, s1) = (agent.distribution(c[0], x) for c in (old, new))
    one, two = (torch.distributions.Normal(m, s.exp()) for m, s in ((m0, s0), (m1, s1)))
    kl = torch.distributions.kl_divergence(one, two).sum(-1).mean()
    assert adapting.divergence(agent, old, new, episode) == pytest.approx(
        float(kl.detach()), rel=1e-4
    )


def test_a_step_that_goes_too_far_is_refused(run: Run, agent: Any, episode: Rollout) -> None:
    _, kl = adapting.adapt(str(run.folder), log(agent, episode), WIDE)
    adapting.adapt(str(run.folder), log(agent, episode), kl * 1.01)
    with pytest.raises(
        adapting.AdaptationError,
        match=rf"is a KL divergence of {kl:.3g} from the old one, more than",
    ):
        adapting.adapt(str(run.folder), log(agent, episode), kl * 0.99)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": np.full((12, 20), np.nan, np.float32)}, "nothing to learn from"),
        ({"valid": np.zeros((12, 20), bool)}, "nothing to learn from"),
        ({"context_0": np.zeros((1, 7), np.float32)}, r"context is of shapes \[\(1, 7\)\]"),
        ({"obs": np.zeros((12, 20, 5), np.float32)}, "not one to adapt to"),
        ({"context_0": np.array(["no"])}, "not one to adapt to"),
    ],
)
def test_a_log_that_does_not_serve_is_refused_in_a_line(
    run: Run, agent: Any, episode: Rollout, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    arrays = log(agent, episode)
    changes = {k: v[: len(arrays[k])] if k in IN_TIME else v for k, v in changes.items()}
    source, out = tmp_path / "log.npz", tmp_path / "out.npz"
    write_npz(source, arrays | changes)
    adapting.main(str(run.folder), source, out)
    with np.load(out, allow_pickle=False) as answer:
        assert list(answer) == ["reason"]
        reason = str(answer["reason"])
    with pytest.raises(MetarobotError, match=message):
        raise MetarobotError(reason)
    assert "\n" not in reason


def with_value(array: Any, place: tuple[int, ...], value: float) -> Any:
    copy = np.array(array)
    copy[place] = value
    return copy


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("action", 1e20, "an action .* standard deviations from what the policy would have chosen"),
        (
            "action",
            -40.0,
            "an action .* standard deviations from what the policy would have chosen",
        ),
        ("reward", 1e6, r"a step's reward of 1e\+06, more than 1000"),
        ("obs", 1e6, "an observation .* standard deviations from the mean"),
    ],
)
def test_numbers_that_the_agent_cannot_have_met_are_refused(
    run: Run, agent: Any, episode: Rollout, name: str, value: float, message: str
) -> None:
    arrays = log(agent, episode)
    place = (0, 3, 2) if name in ("action", "obs") else (0, 3)
    with pytest.raises(adapting.AdaptationError, match=message):
        adapting.adapt(
            str(run.folder), arrays | {name: with_value(arrays[name], place, value)}, WIDE
        )


def test_half_of_the_rollouts_must_be_whole(run: Run, agent: Any, episode: Rollout) -> None:
    arrays = log(agent, episode)
    count = episode.reward.shape[1]
    half = count // 2
    broken = arrays["reward"].copy()
    broken[0, half + 1 :] = np.nan
    _, kl = adapting.adapt(str(run.folder), arrays | {"reward": broken}, WIDE)
    assert kl > 0
    broken[0, 1:] = np.nan
    with pytest.raises(adapting.AdaptationError, match=f"1 of {count} rollouts are whole and fin"):
        adapting.adapt(str(run.folder), arrays | {"reward": broken}, WIDE)
    # Whoever ends without an end, or with a hole, is not whole
    for name in ("terminated", "truncated"):
        arrays[name] = np.zeros_like(arrays[name])
    with pytest.raises(adapting.AdaptationError, match=f"0 of {count} rollouts are whole and fin"):
        adapting.adapt(str(run.folder), arrays, WIDE)
    assert [adapting.quorum(n) for n in (1, 2, 3, 4, 5, 20)] == [1, 2, 2, 2, 3, 10]


def judged(run: Run, before: list[float], after: list[float]) -> tuple[Any, int]:
    """Adapt after episodes of some returns, and play others with the new weights.

    Returns what the review said, and after how many of them.
    """
    source = "; ".join(
        [
            "import numpy, sys",
            "numpy.savez(sys.argv[3], kl=1.0, context_0=numpy.ones((1, 4), numpy.float32))",
        ]
    )
    client = AdaptationClient(
        meta(run, 4, horizon=2), rollouts=len(before), command=(sys.executable, "-c", source)
    )

    def play(total: float) -> None:
        for _ in range(2):
            client.step(np.zeros(17), np.zeros(6), total / 2)
        client.end(np.zeros(17), failed=False)

    for total in before:
        play(total)
        assert client.review() is None
    client.start({"weights": np.zeros((1, 4), np.float32)})
    assert outcome(client).context is not None
    for count, total in enumerate(after, 1):
        play(total)
        undone = client.review()
        if undone is not None:
            assert client.collected == 0
            return undone, count
    return None, len(after)


HONEST_BEFORE = [-30.0, -25.0, -27.0, -29.0, -24.0, -28.0, -26.0, -27.0]


def test_weights_that_make_it_clearly_worse_are_given_up_early(run: Run) -> None:
    """As with rewards of the wrong sign, from which it learns the opposite: -27 to -93."""
    undone, count = judged(run, HONEST_BEFORE, [-93.0, -90.0, -97.0, -92.0])
    assert count == 3
    assert undone.context["weights"].tolist() == [[0.0] * 4]
    assert undone.reason == "the mean return fell from -27.0 to -93.3 in 3 episodes"


def test_weights_that_are_a_little_worse_are_given_up_in_the_end(run: Run) -> None:
    undone, count = judged(run, HONEST_BEFORE, [x - 0.5 for x in HONEST_BEFORE])
    assert count == len(HONEST_BEFORE)
    assert "fell from -27.0 to -27.5" in undone.reason


def test_weights_that_help_stay(run: Run) -> None:
    undone, _ = judged(run, HONEST_BEFORE, [-20.0, -31.0, *[-10.0] * 6])
    assert undone is None
    undone, _ = judged(run, HONEST_BEFORE, [float("nan")] * 3)
    assert undone is not None


@pytest.mark.slow  # two adaptations of a trained agent in the simulation
def test_an_agent_that_learns_from_flipped_rewards_is_rolled_back(tmp_path: Path) -> None:
    """The rewards are turned round between the robot and the agent that adapts to them."""
    from metarobot.bridge.controller import Controller
    from metarobot.bridge.loop_timing import SteppedClock
    from metarobot.bridge.policy.onnx_policy import OnnxPolicy
    from metarobot.bridge.robots import lookup
    from metarobot.bridge.run_report import RunSettings
    from metarobot.deploy.onnx_export import export

    vel = open_run("CheetahVel100-promp")
    export(vel, tmp_path / "policy", tasks=1)
    flip = (
        "import runpy, sys, numpy; a = dict(numpy.load(sys.argv[2])); a['reward'] *= -1; "
        "numpy.savez(sys.argv[2], **a); "
        "runpy.run_module('metarobot.deploy.adaptation_worker', run_name='__main__')"
    )
    reports = {}
    for name, command in (("honest", ()), ("flipped", (sys.executable, "-c", flip))):
        policy = OnnxPolicy.load(tmp_path / "policy")
        robot = lookup.make_robot("sim", policy.meta, lockstep=True)
        robot.connect()
        client = AdaptationClient(
            policy.meta, rollouts=10, run="CheetahVel100-promp", deadline_s=300, command=command
        )
        settings = RunSettings(hz=policy.meta.control_hz, seconds=1e6, trials=1, episodes=2)
        controller = Controller(
            policy,
            robot,
            lookup.make_layout(policy.meta),
            settings,
            clock=SteppedClock(),
            adaptation=client,
        )
        reports[name] = controller.run()
        robot.disconnect()
    assert "switched to new weights" in reports["honest"].adapted[0]
    assert not any("rolled back" in line for line in reports["honest"].adapted)
    assert "switched to new weights" in reports["flipped"].adapted[0]
    assert "rolled back to the old weights" in reports["flipped"].adapted[1]


def test_other_files_than_a_log_are_refused_and_run_no_code(run: Run, tmp_path: Path) -> None:
    source, out = tmp_path / "log.npz", tmp_path / "out.npz"
    np.savez(source, obs=np.array([{"a": 1}], dtype=object))
    for _ in range(2):
        adapting.main(str(run.folder), source, out)
        with np.load(out) as answer:
            assert "not one to adapt to" in str(answer["reason"])
        source.write_bytes(b"rubbish")


def test_who_imitates_does_not_adapt_to_its_own_episodes(episode: Rollout) -> None:
    imitator = open_run("Placement-imitation")
    with pytest.raises(adapting.AdaptationError, match="imitation adapts to demonstrations"):
        adapting.adapt(str(imitator.folder), {}, DEFAULT_KL_BOUND)


def ended(run: Run, program: str, episode: Rollout, **settings: Any) -> AdaptationResult:
    """What is made of a process that does something else than adapting."""
    rollouts, command = episode.reward.shape[1], (sys.executable, "-I", "-S", "-c", program)
    about = meta(run, 4, len(episode.reward))
    client = recorded(
        AdaptationClient(
            about, rollouts=rollouts, command=command, **{"deadline_s": 300.0} | settings
        ),
        episode,
    )
    client.start({"weights": np.zeros((1, 4), np.float32)})
    return outcome(client)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('error: the run is gone')", "adapting failed: the run is gone"),
        ("import os; os.kill(os.getpid(), 9)", "adapting failed: exit code -9"),
        ("pass", "adapting wrote garbage: .*No such file"),
        ("import sys; open(sys.argv[3], 'wb').write(b'junk')", "adapting wrote garbage"),
    ],
)
def test_whatever_becomes_of_the_process_the_old_context_stays(
    run: Run, episode: Rollout, program: str, message: str
) -> None:
    found = ended(run, program, episode)
    assert found.context is None
    with pytest.raises(BridgeError, match=message):
        raise BridgeError(found.reason)
    assert "\n" not in found.reason


def answered(run: Run, episode: Rollout, path: Path, **answer: Any) -> AdaptationResult:
    """What is made of an answer."""
    np.savez(path, **answer)
    return ended(run, f"import shutil, sys; shutil.copy({str(path)!r}, sys.argv[3])", episode)


VALID = np.ones((1, 4), np.float32)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"kl": 1.0}, "adapting wrote garbage: .*context_0"),
        ({"kl": 1.0, "context_0": VALID * np.nan}, "or not finite"),
        ({"kl": 1.0, "context_0": VALID[:, 1:]}, r"of shape \(1, 3\)"),
        ({"kl": 1.0, "context_0": VALID.astype(float)}, "weights is float64"),
        ({"kl": np.nan, "context_0": VALID}, "a KL divergence of nan, more than 60"),
        ({"kl": 200.0, "context_0": VALID}, "a KL divergence of 200, more than 60"),
        ({"kl": 1.0, "context_0": np.array([None])}, "adapting wrote garbage: .*allow_pickle"),
        ({"reason": np.array("it is too far")}, "it is too far"),
    ],
)
def test_an_answer_that_is_not_whole_is_not_believed(
    run: Run, episode: Rollout, tmp_path: Path, answer: dict[str, Any], message: str
) -> None:
    found = answered(run, episode, tmp_path / "answer.npz", **answer)
    assert found.context is None
    with pytest.raises(BridgeError, match=message):
        raise BridgeError(found.reason)
    assert "\n" not in found.reason


def test_a_late_process_is_ended(run: Run, episode: Rollout) -> None:
    found = ended(run, "import time; time.sleep(60)", episode, deadline_s=0.3)
    assert (found.context, found.reason) == (None, "adapting took longer than 0.3 s")
    assert found.seconds < 60


def test_a_process_that_answers_is_believed(run: Run, episode: Rollout, tmp_path: Path) -> None:
    found = answered(run, episode, tmp_path / "answer.npz", kl=1.0, context_0=VALID)
    assert found.context is not None
    assert found.context["weights"].tolist() == [[1.0] * 4]


def test_stopping_ends_the_process(run: Run, episode: Rollout) -> None:
    program = (sys.executable, "-c", "import time; time.sleep(60)")
    client = AdaptationClient(meta(run, 4, 12), rollouts=1, command=program)
    client.step(np.zeros(17), np.zeros(6), 1.0)
    client.end(np.zeros(17), failed=False)
    client.start({"weights": np.zeros((1, 4), np.float32)})
    process = client._process
    assert process is not None
    client.stop()
    client.stop()
    assert process.poll() is not None
    assert (client.busy, client.poll()) == (False, None)


def test_only_whole_episodes_count(run: Run) -> None:
    client = AdaptationClient(meta(run, 4, horizon=3), rollouts=2)
    client.end(np.zeros(17), failed=False)
    assert client.collected == 0  # nothing was recorded
    client.step(np.ones(17), np.ones(6), 1.0)
    client.drop()
    assert client.collected == 0
    assert not any(x.any() for x in client._arrays.values())
    for _ in range(5):  # two more than the horizon
        client.step(np.ones(17), np.ones(6), 1.0)
    client.end(np.full(17, 2.0), failed=True)
    assert (client.collected, client.ready) == (1, False)
    assert client._arrays["terminated"][:, 0].tolist() == [False, False, True]
    assert client._arrays["valid"].sum() == 3
    with pytest.raises(BridgeError, match="adapting needs 2 episodes and one process: 1 are there"):
        client.start({})


def test_settings_that_make_no_sense(run: Run) -> None:
    about = meta(run, 4)
    for bad in ({"rollouts": -1}, {"kl": -1.0}, {"deadline_s": 0.0}, {"kl": float("nan")}):
        with pytest.raises(BridgeError, match=f"{next(iter(bad))} must be above 0"):
            AdaptationClient(about, **bad)
    assert AdaptationClient(about).rollouts == 20
    about.adapts = "acting"
    with pytest.raises(BridgeError, match="'promp' does not adapt between episodes"):
        AdaptationClient(about)
    with pytest.raises(adapting.AdaptationError, match="kl must be a positive number, not nan"):
        adapting.main("x", Path("y"), Path("z"), kl=float("nan"))
