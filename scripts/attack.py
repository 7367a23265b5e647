"""Attack metarobot as strangers and bad luck do, and print whether its promises are kept.

    python scripts/attack.py [--fast]

The promises are those of docs/security.md. First the command line is attacked as a user would meet
it: folders with planted modules, damaged and hostile files, a diverging training, two writers, a
kill. Then come the tests that attack from within, and seeded fuzzing of files and of the wire. It
takes under ten minutes on a quiet machine. ``--fast`` leaves out the last two; ``make test`` runs
those tests anyway. Exit code 1 if a promise was not kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

METAROBOT = [sys.executable, "-P", "-m", "metarobot"]
AGENT = "QuadrupedMix-rl2"
"""An agent in the box: a run folder like any other."""
TRAIN = [
    *("train", "CheetahDir100", "--agent", "rl2", "--threads", "1", "--worlds", "4"),
    *("--minibatches", "2", "--epochs", "2", "--save-every", "1"),
]
"""A training of little iterations."""
LIMIT_S = 180
"""A command that takes longer hangs; on a quiet machine the longest takes 25 s."""
PLANTED = (
    "random.py",
    "mcap.py",
    "numpy.py",
    "json.py",
    "torch.py",
    "mujoco.py",
    "sitecustomize.py",
)
"""Modules that lie in a folder of a stranger."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an attack."""

    item: str
    """Section and number in the list of attacks: A is loading, B the robot, C training."""
    attack: str
    happened: str
    kept: bool
    seconds: float = 0.0


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; 124 if it took longer than ``LIMIT_S``."""
    output: str

    @property
    def line(self) -> str:
        """Its error, or else its last line."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or [""])[-1]

    @property
    def refused(self) -> bool:
        """Whether it is one line of error and exit code 2."""
        errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        return self.code == 2 and len(errors) == 1 and "Traceback" not in self.output


def run(folder: Path, *arguments: str) -> Ended:
    """Run ``metarobot`` in a folder."""
    try:
        done = subprocess.run(
            [*METAROBOT, *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Ended(code=124, output=f"it takes more than {LIMIT_S} s")
    return Ended(code=done.returncode, output=done.stdout.decode(errors="replace"))


class Victims:
    """What is attacked: copies of a policy folder and of run folders, made once."""

    def __init__(self, scratch: Path) -> None:
        """Export a policy and train a run.

        Raises:
            RuntimeError: One of them fails.
        """
        self.scratch = scratch
        for name, arguments in (
            ("policy", ["export", AGENT]),
            ("run", [*TRAIN, "--steps", "6400"]),
        ):
            ended = run(scratch, *arguments, "--out", str(scratch / name))
            if ended.code:
                raise RuntimeError(f"cannot prepare the {name}: {ended.line}")

    def copy(self, name: str) -> Path:
        """Return a fresh copy of the policy or run folder."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch)) / name
        shutil.copytree(self.scratch / name, folder)
        return folder

    def empty(self) -> Path:
        """Return a new folder."""
        return Path(tempfile.mkdtemp(dir=self.scratch))


def plant(folder: Path) -> Path:
    """Put modules into a folder that leave a trace when they run; return the trace."""
    trace = folder.parent / "trace"
    for name in PLANTED:
        (folder / name).write_text(f"open({str(trace)!r}, 'a').write({name!r})\n")
    return trace


def planted_in_policy(victims: Victims) -> tuple[str, bool]:
    folder = victims.copy("policy")
    trace = plant(folder)
    ended = run(folder, "run", ".", "--robot", "sim", "--seconds", "1")
    return _planted(ended, trace)


def planted_in_run(victims: Victims) -> tuple[str, bool]:
    folder = victims.copy("run")
    trace = plant(folder)
    ended = run(folder, "evaluate", ".", "--tasks", "1", "--episodes", "1")
    return _planted(ended, trace)


def _planted(ended: Ended, trace: Path) -> tuple[str, bool]:
    if trace.exists():
        return f"ran {trace.read_text()}", False
    # a busy machine may end a run for missed deadlines, which is no concern of this attack
    return "none of them ran", ended.code != 124 and "Traceback" not in ended.output


def policy_value(change: dict[str, object], sealed: bool) -> Callable[[Victims], tuple[str, bool]]:
    """Change ``policy.json``, as bad luck does or, with new hashes, as a stranger does."""

    def attack(victims: Victims) -> tuple[str, bool]:
        from policy_fuzzing import seal

        folder = victims.copy("policy")
        data = json.loads((folder / "policy.json").read_text()) | change
        if sealed:
            seal(folder, json.dumps(data), (folder / "policy.onnx").read_bytes())
        else:
            (folder / "policy.json").write_text(json.dumps(data))
        return _refused(run(folder.parent, "run", "policy", "--robot", "sim", "--seconds", "1"))

    return attack


def _refused(ended: Ended, words: str = "") -> tuple[str, bool]:
    return ended.line, ended.refused and words in ended.line


def policy_file(replace: Callable[[Path], None]) -> Callable[[Victims], tuple[str, bool]]:
    """Replace ``policy.onnx`` by something else."""

    def attack(victims: Victims) -> tuple[str, bool]:
        folder = victims.copy("policy")
        (folder / "policy.onnx").unlink()
        replace(folder / "policy.onnx")
        return _refused(run(folder.parent, "run", "policy", "--robot", "sim", "--seconds", "1"))

    return attack


def run_file(name: str, text: str) -> Callable[[Victims], tuple[str, bool]]:
    """Replace a JSON file of a run folder."""

    def attack(victims: Victims) -> tuple[str, bool]:
        folder = victims.copy("run")
        (folder / name).write_text(text)
        return _refused(run(folder.parent, "evaluate", "run", "--tasks", "1"))

    return attack


def lost_checkpoint(victims: Victims) -> tuple[str, bool]:
    """Damage the newest checkpoint: an older one is used, and a line says so."""
    folder = victims.copy("run")
    (folder / "checkpoint.json").write_text("{}")
    ended = run(folder.parent, "evaluate", "run", "--tasks", "1", "--episodes", "1")
    said = [line for line in ended.output.splitlines() if "checkpoint" in line]
    return (said or [ended.line])[0], ended.code == 0 and bool(said)


def pickled_weights(victims: Victims) -> tuple[str, bool]:
    import pickle

    folder = victims.copy("run")
    trace = folder.parent / "trace"

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
            return open, (str(trace), "w")

    for file in folder.glob("*.safetensors"):
        file.write_bytes(pickle.dumps(Payload()))
    ended = run(folder.parent, "evaluate", "run", "--tasks", "1")
    return ended.line, ended.refused and not trace.exists()


def model(text: str, words: str = "") -> Callable[[Victims], tuple[str, bool]]:
    """Give an agent a robot's model file."""

    def attack(victims: Victims) -> tuple[str, bool]:
        folder = victims.empty()
        (folder / "robot.xml").write_text(text)
        ended = run(folder, "evaluate", AGENT, "--tasks", "1", "--robot", "robot.xml")
        return _refused(ended, words)

    return attack


def changed_robot(victims: Victims) -> tuple[str, bool]:
    """Train on a robot's file, change the file, and resume."""
    from metarobot.envs.robots import panda

    folder = victims.empty()
    path = folder / "robot.xml"
    spec = panda.panda()
    for site in spec.sites:
        spec.delete(site)
    for body in spec.bodies[1:]:
        body.ipos = [0.0 if x != x else x for x in body.ipos]  # NaN: not given
    root = ET.fromstring(spec.to_xml())
    path.write_text(ET.tostring(root, encoding="unicode"))
    words = ["train", "GraspShapes", "--agent", "blind", "--threads", "1", "--worlds", "2"]
    words += ["--minibatches", "1", "--epochs", "1", "--save-every", "1", "--robot", "robot.xml"]
    first = run(folder, *words, "--steps", "400", "--out", "run")
    if first.code:
        return f"the training fails: {first.line}", False

    mass = next(element for element in root.iter("inertial"))
    mass.set("mass", str(2 * float(mass.get("mass", "1"))))
    path.write_text(ET.tostring(root, encoding="unicode"))
    again = run(folder, *words, "--steps", "800", "--out", "run", "--resume")
    said = [line for line in again.output.splitlines() if "robot" in line and "differ" in line]
    said += [line for line in again.output.splitlines() if "changed" in line]
    return (said or [again.line])[0], bool(said) and "Traceback" not in again.output


def diverging(victims: Victims) -> tuple[str, bool]:
    """Train with a learning rate that is far too large."""
    folder = victims.empty()
    words = ["train", "CheetahDir100", "--agent", "ppo", "--threads", "1", "--worlds", "4"]
    words += ["--minibatches", "2", "--epochs", "2", "--lr", "1e12", "--grad-norm", "1e12"]
    ended = run(folder, *words, "--steps", "1e5", "--out", "run")
    kept = ended.refused and "iteration" in ended.line
    weights = list((folder / "run").glob("*.safetensors"))
    return ended.line, kept and not any(_has_nan(file) for file in weights)


def _has_nan(file: Path) -> bool:
    from safetensors.numpy import load_file

    return any((values != values).any() for values in load_file(file).values())


def nan_weights(victims: Victims) -> tuple[str, bool]:
    """Evaluate an agent whose weights are NaN, with hashes that fit: it must not score."""
    from safetensors.numpy import load_file, save_file

    from metarobot.training.run_files import read_sealed, write_sealed

    folder = victims.copy("run")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for values in tensors.values():
            if values.dtype.kind == "f":
                values[...] = float("nan")
        save_file(tensors, file)
    for entry in folder.glob("checkpoint*.json"):
        data = read_sealed(entry)
        weights = (folder / data["weights"]).read_bytes()
        write_sealed(entry, data | {"sha256": hashlib.sha256(weights).hexdigest()})
    return _refused(run(folder.parent, "evaluate", "run", "--tasks", "2"), "")


def two_writers(victims: Victims) -> tuple[str, bool]:
    """Start a second training in a folder while the first runs."""
    folder = victims.empty()
    first = subprocess.Popen(
        [*METAROBOT, *TRAIN, "--steps", "1e7", "--out", "run"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(folder / "run" / "checkpoint.json", first)
        second = run(folder, *TRAIN, "--steps", "1e7", "--out", "run", "--resume")
        alive = first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    after = run(folder, "evaluate", "run", "--tasks", "1", "--episodes", "1")
    return second.line, second.refused and alive and after.code == 0


def _wait_for(file: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def killed(victims: Victims) -> tuple[str, bool]:
    """Kill a training with -9, resume it, and compare the weights with the uninterrupted run's."""
    folder = victims.empty()
    words = [*TRAIN, "--steps", "6400", "--out", "run"]
    victim = subprocess.Popen(
        [*METAROBOT, *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _wait_for(folder / "run" / "checkpoint.json", victim)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    resumed = run(folder, *words, "--resume")
    same = _newest_weights(folder / "run") == _newest_weights(victims.scratch / "run")
    if resumed.code:
        return resumed.line, False
    return "the same bits as uninterrupted" if same else "other weights", same


def _newest_weights(folder: Path) -> list[bytes]:
    entry = json.loads((folder / "checkpoint.json").read_text())
    names = re.findall(r"[\w.-]+\.safetensors", json.dumps(entry))
    if not names:
        names = [max(folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime).name]
    from safetensors.numpy import load_file

    tensors = load_file(folder / names[-1])
    return [tensors[name].tobytes() for name in sorted(tensors)]


DEEP = "[" * 100_000
LAUGHS = "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(9))
COMMANDS: tuple[tuple[str, str, Callable[[Victims], tuple[str, bool]]], ...] = (
    ("A1", "seven modules planted in a policy folder, `run .`", planted_in_policy),
    ("A1", "seven modules planted in a run folder, `evaluate .`", planted_in_run),
    ("A2", "a policy's rate changed", policy_value({"control_hz": 51}, sealed=False)),
    (
        "A2",
        "a stranger's policy: kp of -1000",
        policy_value({"joint_stiffness": [-1000.0] * 12}, sealed=True),
    ),
    (
        "A2",
        "a stranger's policy: a pose of 1e6 rad",
        policy_value({"default_joint_pos": [1e6] * 12}, sealed=True),
    ),
    ("A3", "policy.onnx is a FIFO", policy_file(os.mkfifo)),
    ("A3", "policy.onnx is /dev/zero", policy_file(lambda p: p.symlink_to("/dev/zero"))),
    (
        "A3",
        "policy.onnx is 4 GB of nothing",
        policy_file(lambda p: (p.touch(), os.truncate(p, 4 << 30))[0]),
    ),
    ("A3", "a pickle as weights", pickled_weights),
    (
        "A3",
        "MJCF includes /etc/passwd",
        model('<mujoco><include file="/etc/passwd"/></mujoco>', "outside its folder"),
    ),
    (
        "A3",
        "MJCF with a billion laughs",
        model(f'<!DOCTYPE m [<!ENTITY a0 "ha">{LAUGHS}]><mujoco model="&a9;"/>', "document type"),
    ),
    ("A3", "MJCF 100,000 deep", model("<mujoco>" + "<worldbody>" * 100_000, "nested")),
    (
        "A3",
        "MJCF with a billion bodies",
        model(
            '<mujoco><worldbody><replicate count="1000000000"><body/></replicate></worldbody>'
            "</mujoco>",
            "MuJoCo",
        ),
    ),
    (
        "A3",
        "MJCF with a height field of 80 GB",
        model(
            '<mujoco><asset><hfield name="h" nrow="100000" ncol="100000" size="1 1 1 1"/></asset>'
            "</mujoco>",
            "robot.xml",
        ),
    ),
    (
        "A3",
        "MJCF with a plugin",
        model('<mujoco><extension><plugin plugin="a"/></extension></mujoco>', "plugins"),
    ),
    ("A4", "config.json 100,000 deep", run_file("config.json", DEEP)),
    ("A4", "config.json is a number", run_file("config.json", "1e999")),
    ("A4", "tasks.json 100,000 deep", run_file("tasks.json", DEEP)),
    ("C14", "the newest checkpoint is damaged", lost_checkpoint),
    ("C13", "a diverging learning rate", diverging),
    ("C13", "an agent of NaN is evaluated", nan_weights),
    ("C15", "a second training in the same folder", two_writers),
    ("C16", "the robot's file changed, `--resume`", changed_robot),
    ("C17", "kill -9 in training, `--resume`", killed),
)


def attack_commands(scratch: Path, tick: Callable[[str], None]) -> list[Outcome]:
    """Attack the command line."""
    victims = Victims(scratch)

    def outcome(attack: tuple[str, str, Callable[[Victims], tuple[str, bool]]]) -> Outcome:
        item, name, function = attack
        started = time.monotonic()
        try:
            happened, kept = function(victims)
        except Exception as e:  # an attack that does not work proves nothing
            happened, kept = f"the attack failed: {type(e).__name__}: {e}", False
        seconds = time.monotonic() - started
        tick(name)
        return Outcome(item=item, attack=name, happened=happened, kept=kept, seconds=seconds)

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(outcome, COMMANDS))


# ---------------------------------------------------------------------------------------------
# Tests that attack from within
# ---------------------------------------------------------------------------------------------

TESTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("A1", "planted modules, for every child process", ("bridge/test_child_processes.py",)),
    (
        "A2",
        "values of policy.json out of bounds, odd JSON, hostile models",
        ("bridge/test_onnx_policy.py", "bridge/test_joint_bounds.py"),
    ),
    ("A3", "model files: paths, bombs, numbers, damage", ("envs/test_model_files.py",)),
    (
        "A3",
        "datasets: code, links, filters, sizes, damage",
        ("training/test_demonstrations.py",),
    ),
    ("A3, B11", "robots' logs from strangers; full disks", ("bridge/test_log.py",)),
    (
        "A4",
        "run folders: damaged, foreign, odd",
        ("training/test_run_folder.py", "training/test_run_fuzzing.py"),
    ),
    ("A5a", "names of machine and user in what is published", ("test_privacy.py",)),
    (
        "B5, B8",
        "drivers that cannot damp; hung policies, silent guards",
        ("bridge/test_controller.py",),
    ),
    ("B6", "the Go2's own signals", ("bridge/test_unitree.py",)),
    (
        "B6",
        "signals of ROS 2 controllers and LeRobot's motors",
        ("bridge/test_ros2.py", "bridge/test_lerobot.py"),
    ),
    ("B7, B9", "falls in every state, implausible readings", ("bridge/test_plausibility.py",)),
    ("B10", "adaptation to spoiled data", ("deploy/test_adaptation_worker.py",)),
    ("B12", "faults on stepped wires", ("bridge/test_fuzz.py",)),
    ("C13", "broken numbers in every learner, broken physics", ("training/test_divergence.py",)),
    (
        "C14 to C16",
        "damaged checkpoints, two writers, changed files",
        ("training/test_checkpoints.py",),
    ),
    ("C17", "kills at random moments", ("training/test_kills.py",)),
)
"""Item, attack, and files of tests below ``tests``; the fast ones run, as in ``make test``."""


def attack_by_tests(scratch: Path, tick: Callable[[str], None]) -> list[Outcome]:
    """Run the tests that attack, a file after the other."""
    outcomes = []
    for item, name, files in TESTS:
        tick(name)
        started = time.monotonic()
        report = scratch / "junit.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-P", "-m", "pytest", f"--junitxml={report}"]
        subprocess.run(
            [*command, *(f"tests/{file}" for file in files)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        happened, kept = _test_results(report)
        seconds = time.monotonic() - started
        outcomes.append(
            Outcome(item=item, attack=name, happened=happened, kept=kept, seconds=seconds)
        )
    return outcomes


def _test_results(report: Path) -> tuple[str, bool]:
    """Return what a JUnit report says."""
    if not report.is_file():
        return "pytest did not run", False
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [c.get("name", "") for c in cases if {"failure", "error"} & {e.tag for e in c}]
    skipped = sum("skipped" in {element.tag for element in case} for case in cases)
    happened = f"{len(cases) - len(failed) - skipped} tests passed"
    if skipped:
        happened += f", {skipped} skipped"
    if failed:
        happened += f", {len(failed)} failed: {', '.join(failed[:3])}"
    return happened, bool(cases) and not failed


# ---------------------------------------------------------------------------------------------
# Fuzzing
# ---------------------------------------------------------------------------------------------

FUZZING: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("A2, A3", "300 damaged policy folders", ("fuzz_files.py", "policy", "--count", "300")),
    ("A3", "1,000 damaged model files", ("fuzz_files.py", "model", "--count", "1000")),
    ("A3", "1,000 damaged datasets", ("fuzz_files.py", "dataset", "--count", "1000")),
    ("A4", "300 damaged run folders", ("fuzz_files.py", "run", "--count", "300")),
    ("A3", "1,000 damaged logs", ("fuzz_files.py", "log", "--count", "1000")),
    ("B12", "20,000 steps with faults of every kind", ("fuzz_bridge.py", "20000")),
    (
        "B12",
        "20,000 ticks on a Go2's wire",
        ("fuzz_wire.py", "--ticks", "20000", "--repeats", "0"),
    ),
)
"""Item, attack, and a script with its arguments; more of each with the scripts themselves."""


def attack_by_fuzzing(tick: Callable[[str], None]) -> list[Outcome]:
    """Run the fuzzers, one after the other."""
    outcomes = []
    for item, name, (script, *arguments) in FUZZING:
        tick(name)
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-P", str(ROOT / "scripts" / script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        ended = Ended(code=done.returncode, output=done.stdout.decode(errors="replace"))
        happened = _fuzzing_line(ended)
        seconds = time.monotonic() - started
        outcomes.append(
            Outcome(
                item=item,
                attack=name,
                happened=happened,
                kept=done.returncode == 0,
                seconds=seconds,
            )
        )
    return outcomes


def _fuzzing_line(ended: Ended) -> str:
    """Return the line that sums a fuzzer up."""
    words = ("promises broken", "nothing unsafe", "no command was")
    found = [line for line in ended.output.splitlines() if any(word in line for word in words)]
    return (found or [ended.line])[-1]


def print_table(outcomes: Sequence[Outcome], seconds: float) -> None:
    """Print a line for each attack, and how long all took together."""
    table = Table("item", "attack", "what happened", "promise", "s")
    for outcome in outcomes:
        printable = "".join(c if c.isprintable() else "?" for c in outcome.happened)
        kept = "kept" if outcome.kept else "[bold red]NOT KEPT[/]"
        table.add_row(outcome.item, outcome.attack, printable[:160], kept, f"{outcome.seconds:.0f}")
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)
    broken = sum(not outcome.kept for outcome in outcomes)
    print(f"{len(outcomes)} attacks in {seconds:.0f} s; promises not kept: {broken}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="the command line alone")
    options = parser.parse_args()

    started = time.monotonic()
    total = len(COMMANDS) + (0 if options.fast else len(TESTS) + len(FUZZING))
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        scratch = Path(folder)
        task = progress.add_task("preparing", total=total)

        def tick(name: str) -> None:
            progress.update(task, advance=1, description=name)

        outcomes = attack_commands(scratch, tick)
        if not options.fast:
            # side by side, which two cores do
            with ThreadPoolExecutor() as pool:
                tested = pool.submit(attack_by_tests, scratch, tick)
                fuzzed = pool.submit(attack_by_fuzzing, tick)
                outcomes += tested.result() + fuzzed.result()
    print_table(outcomes, time.monotonic() - started)
    return 1 if any(not outcome.kept for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
