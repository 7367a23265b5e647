import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from trial_learners import FAMILY, TASKS, build, build_perturbed, collect_trials

from metarobot.cli.main import main
from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.evaluation.context_ablations import swap_contexts
from metarobot.learning.agent_interface import Context, Learner, agents
from metarobot.learning.gaussian_posterior import Gaussian, PosteriorError, standard_normal
from metarobot.learning.ppo_core import last_step
from metarobot.training.checkpoints import save_checkpoint
from metarobot.training.collect import collect
from metarobot.training.config import TrainConfig
from metarobot.training.run_folder import open_run
from metarobot.training.train import start_run, train
from metarobot.types import Percept, Rollout, join_episodes

SMALL = {"latent": 2, "posteriors": 16, "transitions": 16}


def last_context(agent, tasks, episodes: int = 2, seed: int = 3) -> Context:
    """The context at the start of the last episode, actions without noise."""
    contexts: list[Context] = [agent.begin(len(tasks))]

    def keep(context: Context) -> Context:
        contexts.append(context)
        return context

    env = Env(FAMILY, tasks, threads=1)
    collect(agent, env, tasks, episodes=episodes, seed=seed, explore=False, between=keep)
    return contexts[-1]


def whole(learner: Learner, trials) -> tuple[Tensor, Gaussian]:
    seq = join_episodes(trials.episodes)
    with torch.no_grad():
        mean, _, q = learner.agent(learner.agent.features(seq.percept), trials.task, seq.critic_obs)
    return mean, q


@pytest.mark.parametrize("kind", ["linear", "gru"])
def test_a_whole_trial_equals_acting_step_by_step(kind: str) -> None:
    learner = build_perturbed("varibad", memory=kind)
    trials = collect_trials(learner, seed=3, explore=False)
    seq = join_episodes(trials.episodes)
    mean, q = whole(learner, trials)
    assert seq.action[seq.valid].abs().mean() > 0.05
    assert torch.allclose(mean[seq.valid], seq.action[seq.valid], atol=1e-5)
    ended = trials.episodes[0].valid.sum(0) - 1
    context = last_context(learner.agent, TASKS)
    for i, x in enumerate(learner.agent.posterior(context)):
        assert torch.allclose(x, q[i][ended, torch.arange(6)], atol=1e-5)
        assert x.std(0).min() > 1e-3


def test_a_trial_begins_with_the_prior_and_adapting_hands_on_mean_and_variance() -> None:
    agent = build_perturbed("varibad", latent=3).agent
    context = agent.begin(4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(agent.posterior(context), standard_normal(torch.empty(4, 3)), strict=True)
    )
    assert [x.shape for x in agent.belief(context)] == [(4, len(FAMILY.space.params))] * 2
    after = last_context(agent, TASKS)
    adapted = agent.adapt(after, collect_trials(build("varibad")).episodes[0])
    assert all(torch.equal(a, b) for a, b in zip(agent.posterior(adapted), after[-2:], strict=True))
    assert (agent.posterior(after).var > 0).all()


def test_acting_leaves_the_context_as_it_was() -> None:
    agent = build_perturbed("varibad").agent
    context = last_context(agent, TASKS)
    kept = [x.clone() for x in context]
    zeros = torch.zeros(6)
    _, after = agent.act(
        Percept(torch.randn(6, 17), torch.randn(6, 6), zeros, zeros, zeros), context
    )
    assert all(torch.equal(a, b) for a, b in zip(context, kept, strict=True))
    assert not torch.equal(after[-2], context[-2])


def test_the_posterior_is_made_of_the_tasks_own_episodes() -> None:
    agent = build_perturbed("varibad").agent
    together = last_context(agent, TASKS)
    company = last_context(agent, [TASKS[0], *reversed(TASKS[1:])])
    assert all(
        torch.allclose(x[0], y[0], atol=1e-6) for x, y in zip(together, company, strict=True)
    )
    assert not torch.allclose(together[-2][1], company[-2][1], atol=1e-3)
    alone = last_context(agent, TASKS[:1])
    assert all(torch.allclose(x[0], y[0], atol=1e-6) for x, y in zip(together, alone, strict=True))


def test_the_context_of_another_task_changes_posterior_belief_and_actions() -> None:
    agent = build_perturbed("varibad").agent
    context = last_context(agent, TASKS)
    other = swap_contexts(TASKS, context)
    zeros = torch.zeros(6)
    percept = Percept(torch.zeros(6, 17), torch.zeros(6, 6), zeros, zeros, zeros)
    for read in (agent.posterior, agent.belief, lambda c: agent.act(percept, c)[:1]):
        assert all(
            not torch.allclose(a, b, atol=1e-3)
            for a, b in zip(read(context), read(other), strict=True)
        )


def bound(learner: Learner, trials, known: Gaussian, passes: int, first: bool = False) -> float:
    """The learner's estimate of the bound a step, averaged over many draws and over the trials."""
    rng, seq, rows = (
        torch.Generator().manual_seed(0),
        join_episodes(trials.episodes),
        torch.arange(6),
    )
    total = 0.0
    for _ in range(passes):
        drawn = learner._draw(seq, rng)
        if first:
            drawn = drawn._replace(times=torch.zeros_like(drawn.times))
        with torch.no_grad():
            loss, parts = learner._auxiliary_loss(known, trials.task, torch.ones(1, 6), drawn, rows)
        total += float(parts[3] - loss)
    return total / passes


def densities(learner: Learner, trials, world: int, m: Tensor) -> Tensor:
    """Log-density a step of all that happened in a trial, by torch's own, for each task ``m``
    ``(draw, latent)``."""
    seq = join_episodes(trials.episodes)
    n = int(last_step(seq)[world]) + 1
    obs, after = (
        learner.agent.norm(torch.cat([x, seq.reward[..., None]], -1))[:n, world : world + 1]
        for x in (seq.percept.obs, seq.next_obs)
    )
    before = torch.cat([obs[..., :-1], seq.action[:n, world : world + 1]], -1)
    errors = learner.decoder(m[:, None], before, after)[:, :, 0]
    return Normal(0.0, learner.decoder.var.sqrt()).log_prob(errors).sum(-1).mean(-1)


@pytest.fixture(scope="module")
def explained() -> tuple[Learner, object, Gaussian]:
    """A learner with posteriors that are far from the prior, its trials, and the posteriors."""
    torch.set_num_threads(1)
    learner = build_perturbed("varibad", minibatches=1, **SMALL)
    with torch.no_grad():
        learner.decoder.var.fill_(4.0)
    trials = collect_trials(build("varibad"))
    return learner, trials, whole(learner, trials)[1]


def test_the_bound_equals_its_estimate_from_samples_of_every_posterior(explained) -> None:
    learner, trials, known = explained
    rng, means = torch.Generator().manual_seed(1), []
    with torch.no_grad():
        for w, end in enumerate(last_step(join_episodes(trials.episodes)).tolist()):
            terms, previous = [], Gaussian(torch.zeros(2), torch.ones(2))
            for t in range(end + 1):
                q = Gaussian(known.mean[t, w], known.var[t, w])
                m = Normal(q.mean, q.var.sqrt()).mean + q.var.sqrt() * torch.randn(
                    24, 2, generator=rng
                )
                pair = (Normal(x.mean, x.var.sqrt()) for x in (q, previous))
                terms.append(
                    densities(learner, trials, w, m).mean() - kl_divergence(*pair).sum() / (end + 1)
                )
                previous = q
            means.append(torch.stack(terms).mean())
    assert bound(learner, trials, known, 60) == pytest.approx(
        float(torch.stack(means).mean()), rel=0.01
    )


def test_the_bound_lies_below_the_evidence(explained) -> None:
    learner, trials, known = explained
    lengths = last_step(join_episodes(trials.episodes)) + 1
    prior = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        evidence = [
            (torch.logsumexp(n * densities(learner, trials, w, prior), 0) - math.log(len(prior)))
            / n
            for w, n in enumerate(lengths)
        ]
    assert bound(learner, trials, known, 20, first=True) < float(torch.stack(evidence).mean())


def test_the_policys_gradient_reaches_the_encoder_only_if_it_may() -> None:
    trials = collect_trials(build("varibad"))
    for through in (False, True):
        agent = build_perturbed("varibad", through=through).agent
        agent.zero_grad()
        seq = join_episodes(trials.episodes)
        mean, value, _ = agent(agent.features(seq.percept), trials.task, seq.critic_obs)
        (mean.sum() + value.sum()).backward()
        reached = {k for k, p in agent.named_parameters() if p.grad is not None and p.grad.any()}
        assert any(k.startswith("actor.") for k in reached)
        assert any(k.startswith(("memory.", "encoder.")) for k in reached) == through


def test_labels_teach_the_belief_and_the_critic_alone() -> None:
    trials = collect_trials(build("varibad"))
    learners = [build("varibad") for _ in range(2)]
    for one, task in zip(learners, (trials.task, trials.task.flip(0)), strict=True):
        one.update(replace(trials, task=task), 0.0, 0)
    a, b = (one.agent.state_dict() for one in learners)
    changed = {k.split(".")[0] for k in a if not torch.equal(a[k], b[k])}
    assert {"labels", "critic"} <= changed <= {"labels", "critic", "actor", "log_std"}


def test_the_posterior_learns_to_tell_tasks_apart() -> None:
    learner = build("varibad", lr=1e-2, epochs=20, kl_stop=1e9)
    trials = collect_trials(learner)
    metrics = [learner.update(trials, 0.0, i) for i in range(6)]
    for k, sign in (("belief_loss", -1), ("reward_log_density", 1), ("motion_log_density", 1)):
        assert sign * (metrics[-1][f"train/{k}"] - metrics[0][f"train/{k}"]) > 0.5


def collapse(learner: Learner) -> None:
    """Make the encoder return the same posterior for all tasks."""
    with torch.no_grad():
        learner.agent.encoder[-1].weight.zero_()


def test_a_collapsed_posterior_is_named() -> None:
    learner = build("varibad", lr=1e-12)
    trials = collect_trials(learner)
    collapse(learner)
    with pytest.raises(
        PosteriorError, match="varibad: the posterior has collapsed, it is the same in all 6 tasks"
    ):
        learner.update(trials, 0.0, 0)


def test_trials_that_are_all_the_same_collapse_it_too() -> None:
    learner, trials = build("varibad"), collect_trials(build("varibad"))

    def one(episode: Rollout) -> Rollout:
        rows = {
            k: v[..., :1, :] if k in ("obs", "action", "critic_obs", "teacher_action") else v
            for k, v in vars(episode).items()
        }
        wide = {
            k: v.expand(*v.shape[:-2], 6, -1)
            for k, v in rows.items()
            if k in ("obs", "action", "critic_obs", "teacher_action")
        }
        flat = {
            k: getattr(episode, k)[:, :1].expand(-1, 6)
            for k in ("reward", "terminated", "truncated", "valid")
        }
        return replace(episode, **wide, **flat, final_obs=episode.final_obs[:1].expand(6, -1))

    with pytest.raises(PosteriorError, match="the same in all 6 tasks"):
        learner.update(replace(trials, episodes=tuple(one(e) for e in trials.episodes)), 0.0, 0)


def test_a_posterior_that_is_not_finite_is_named() -> None:
    learner = build("varibad")
    trials = collect_trials(learner)
    with torch.no_grad():
        learner.agent.encoder[-1].bias[0] = float("nan")
    with pytest.raises(
        PosteriorError,
        match="varibad: the posterior is not finite any more; take a lower learning rate",
    ):
        learner.update(trials, 0.0, 0)


def test_training_stops_at_a_collapsed_posterior_with_the_checkpoint_as_it_was(
    tmp_path: Path, capsys
) -> None:
    config = agents.get("varibad").config(worlds=4, minibatches=2, epochs=1, width=16, lr=0.0)
    settings = TrainConfig(
        family="CheetahDir100", agent="varibad", steps=2400, threads=1, save_every=1
    )
    run = start_run(settings, config, tmp_path / "x")
    learner = run.learner()
    trials = collect(
        learner.agent,
        Env(run.family, run.family.space.sample("train", 4)),
        run.family.space.sample("train", 4),
        episodes=2,
        seed=0,
    )
    learner.update(trials, 0.0, 0)
    collapse(learner)
    save_checkpoint(run.folder, learner.state(), {"iteration": 1, "steps": 800, "elapsed_s": 1.0})
    before = (run.folder / "checkpoint.json").read_bytes()
    with pytest.raises(PosteriorError, match="has collapsed"):
        train(run, show=False)
    assert (run.folder / "checkpoint.json").read_bytes() == before
    assert open_run(run.folder).load_agent().begin(1)
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "train",
                "CheetahDir100",
                "--agent",
                "varibad",
                "--steps",
                "2400",
                "--resume",
                "--out",
                str(run.folder),
            ]
        )
    assert stopped.value.code == 2
    assert "the posterior has collapsed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["latent", "posteriors", "transitions"])
def test_counts_below_one_are_refused(tmp_path: Path, name: str) -> None:
    settings = TrainConfig(family="CheetahDir100", agent="varibad")
    with pytest.raises(MetarobotError, match=f"{name} must be at least 1, not 0"):
        start_run(settings, agents.get("varibad").config(**{name: 0}), tmp_path / "x")
