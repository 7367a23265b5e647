import re

import pytest
from fuzzing import FAULTS, fuzz
from udp_robot import UdpPeer
from wire_faults import (
    GUARD_SIGNALS,
    NOTICED_AFTER_S,
    PERIOD_S,
    SLACK_S,
    drive_and_break,
    start_controller,
    write_policy_folder,
)

from metarobot.bridge.safety.command_gate import damping_bounds_s


def test_nothing_unsafe_leaves_whatever_goes_wrong():
    counts = fuzz(1500, seed=0)
    assert counts["commands"] > 1000
    assert {fault for fault in FAULTS if counts[fault]} == set(FAULTS)


def test_nothing_unsafe_is_on_a_go2s_wire_whatever_goes_wrong():
    pytest.importorskip("cyclonedds", reason="pip install 'metarobot[deploy]'")
    from dds_wire import FAULTS as WIRE_FAULTS
    from dds_wire import fuzz_dds
    from wires import domain

    counts = fuzz_dds(2000, seed=0, domain=domain())
    assert counts["commands"] > 1500
    assert {fault for fault in WIRE_FAULTS if counts[fault]} == set(WIRE_FAULTS)


@pytest.mark.slow
def test_nothing_unsafe_is_on_a_go2s_wire_in_a_long_run():
    pytest.importorskip("cyclonedds", reason="pip install 'metarobot[deploy]'")
    from dds_wire import fuzz_dds
    from wires import domain

    assert fuzz_dds(50_000, seed=1, domain=domain())["commands"] > 40_000


@pytest.mark.slow  # by the clock, in processes of their own: a busy host fails it
@pytest.mark.parametrize(
    "fault",
    [
        "silence",
        "nan",
        "jump",
        "frozen values",
        "kill -9",
        "SIGTERM",
        "guard kill -9",
        "guard SIGSTOP",
        "policy hangs",
        "damping raises",
    ],
)
def test_on_the_wire_damping_follows_and_nothing_unsafe_comes_before(fault, tmp_path):
    result = drive_and_break(write_policy_folder(tmp_path), fault)
    bound_s = damping_bounds_s(PERIOD_S)[1] + NOTICED_AFTER_S.get(fault, 0.0) + SLACK_S
    assert 0 <= result.after_command_s <= bound_s
    if fault in GUARD_SIGNALS:
        assert result.after_fault_s <= bound_s
        assert "the guard process" in result.output
    assert result.exit_code == {"kill -9": -9, "SIGTERM": 0}.get(fault, 1)


def test_one_controller_at_a_time(tmp_path):
    folder = write_policy_folder(tmp_path)
    with UdpPeer() as peer:
        first = start_controller(folder, peer.port)
        assert first.stdout.readline() == "driving\n"
        second = start_controller(folder, peer.port)
        output = second.communicate(timeout=60)[0]
        first.terminate()
        first.communicate(timeout=60)
    assert second.returncode == 2
    assert re.fullmatch(
        rf"error: udp:{peer.port} has a controller already: process {first.pid}; stop that first\n",
        output,
    )
