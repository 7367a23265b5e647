import re

import pytest
from fuzzing import FAULTS, fuzz
from udp_robot import Peer
from wire_faults import PERIOD, SLACK, folder, start, strike

from metarobot.bridge.safety.command_gate import damping_bounds_s


def test_nothing_unsafe_leaves_whatever_goes_wrong():
    met = fuzz(1500, seed=0)
    assert met["commands"] > 1000
    assert {f for f in FAULTS if met[f]} == set(FAULTS)


@pytest.mark.slow  # by the clock, in processes of their own: a busy host fails it
@pytest.mark.parametrize("fault", ["silence", "nan", "kill -9", "SIGTERM", "policy hangs"])
def test_on_the_wire_damping_follows_and_nothing_unsafe_comes_before(fault, tmp_path):
    outcome = strike(folder(tmp_path), fault)
    assert 0 <= outcome.after_command <= damping_bounds_s(PERIOD)[1] + SLACK
    assert outcome.code == {"kill -9": -9, "SIGTERM": 0}.get(fault, 1)


def test_one_controller_at_a_time(tmp_path):
    with Peer() as peer:
        first = start(folder(tmp_path), peer.port)
        assert first.stdout.readline() == "driving\n"
        second = start(tmp_path, peer.port)
        said = second.communicate(timeout=60)[0]
        first.terminate()
        first.communicate(timeout=60)
    assert second.returncode == 2
    assert re.fullmatch(
        rf"error: udp:{peer.port} has a controller already: process {first.pid}; stop that first\n",
        said,
    )
