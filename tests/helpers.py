from pathlib import Path

from metarobot.agent import agents
from metarobot.checkpoint import Run
from metarobot.train import TrainConfig, start, train


def tiny_run(out: Path, agent: str = "rl2", family: str = "CheetahDir100", seed: int = 0, steps: int = 1600) -> Run:
    """Train for a few small iterations: real weights and a real run folder, no skill."""
    config = agents.get(agent).config(worlds=4, minibatches=2, epochs=2)
    settings = TrainConfig(family=family, agent=agent, steps=steps, seed=seed, threads=1, save_every=1)
    run = start(settings, config, out)
    assert train(run, show=False)
    return run
