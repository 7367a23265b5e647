import re

import pytest
from fuzzing import FAULTS, fuzz
from udp_robot import UdpPeer
from wire_faults import (
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


@pytest.mark.slow  # by the clock, in processes of their own: a busy host fails it
@pytest.mark.parametrize("fault", ["silence", "nan", "kill -9", "SIGTERM", "policy hangs"])
def test_on_the_wire_damping_follows_and_nothing_unsafe_comes_before(fault, tmp_path):
    result = drive_and_break(write_policy_folder(tmp_path), fault)
    assert 0 <= result.after_command_s <= damping_bounds_s(PERIOD_S)[1] + SLACK_S
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
