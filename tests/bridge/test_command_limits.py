import math

import numpy as np
import pytest
from bridging import JOINTS, LIMIT, meta
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from metarobot.bridge.safety.command_limits import (
    LIMIT_KINDS,
    CommandLimiter,
    UnsafeCommandError,
    blend,
)

PERIOD = 0.02
KP, KD = 40.0, 1.0
anything = arrays(np.float64, 2, elements=st.floats(allow_nan=True, allow_infinity=True))
likely = arrays(np.float64, 2, elements=st.floats(-3, 3))
speeds = arrays(np.float64, 2, elements=st.floats(-25, 25))


def torque(target: np.ndarray, pos: np.ndarray, vel: np.ndarray) -> np.ndarray:
    return KP * (target - pos) - KD * vel


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(anything | likely, anything | likely, anything | speeds), min_size=1, max_size=5
    )
)
def test_whatever_comes_in_what_goes_out_is_finite_and_within_limits(steps):
    guard = CommandLimiter(meta(), PERIOD, rate=1.0)
    last = None
    for target, pos, vel in steps:
        try:
            out = guard(target, pos, vel).copy()
        except UnsafeCommandError:
            continue
        assert np.isfinite(out).all()
        assert (out >= LIMIT["low"]).all()
        assert (out <= LIMIT["high"]).all()
        drive = torque(out, pos, vel)
        assert (np.abs(drive) <= LIMIT["torque"] * (1 + 1e-9)).all()
        assert (
            drive[vel > LIMIT["velocity"]] <= 1e-9
        ).all()  # a joint that is too fast is not driven on
        assert (drive[vel < -LIMIT["velocity"]] >= -1e-9).all()
        if last is not None:
            far = np.abs(out - last) > LIMIT["velocity"] * PERIOD + 1e-12
            assert (guard.hit[1] | guard.hit[2])[
                far
            ].all()  # faster only where another limit made it
        last = out


@given(anything, st.floats(-2, 2), st.floats(-2, 2))
def test_a_command_without_joints_stays_in_its_range(target, a, b):
    low, high = min(a, b), max(a, b) + 0.1
    about = meta(
        layout="direct", action=meta().action.__class__(("x", "y"), (low, low), (high, high))
    )
    guard = CommandLimiter(about, PERIOD)
    try:
        out = guard(target, np.zeros(2), np.zeros(2))
    except UnsafeCommandError:
        assert not math.hypot(*target) < 1e9
        return
    np.testing.assert_array_equal(out, np.clip(target, low, high))


def test_what_is_within_all_limits_goes_through_untouched():
    guard = CommandLimiter(meta(), PERIOD)
    target = np.array([0.1, -0.3])
    np.testing.assert_array_equal(guard(target, np.zeros(2), np.zeros(2)), target)
    assert not guard.counts.any()
    assert guard.report() == {}


@pytest.mark.parametrize(
    ("kind", "target", "pos", "vel", "expected"),
    [
        ("position", 1.2, 0.9, 0.0, 1.0),
        ("torque", 0.9, 0.0, 0.0, 0.5),  # τ_max / kp
        ("torque", -0.9, 0.0, 2.0, -0.45),
        ("velocity", 0.5, 0.0, 12.0, 0.3),  # kd q̇ / kp: no torque
    ],
)
def test_each_limit_moves_a_target_to_its_edge_and_is_counted(kind, target, pos, vel, expected):
    guard = CommandLimiter(meta(), PERIOD)
    out = guard(np.array([target, 0.0]), np.array([pos, 0.0]), np.array([vel, 0.0]))
    assert out[0] == pytest.approx(expected)
    assert guard.report() == {"hip": {kind: 1}}
    assert guard.bits().tolist() == [1 << LIMIT_KINDS.index(kind), 0]


def test_a_target_moves_at_the_joints_own_speed_at_most():
    guard = CommandLimiter(meta(), PERIOD, rate=0.5)
    guard.begin(np.zeros(2))
    for i in range(1, 4):
        out = guard(np.array([0.45, 0.0]), np.zeros(2), np.zeros(2))
        assert out[0] == pytest.approx(0.1 * i)
    assert guard.report() == {"hip": {"rate": 3}}


def test_a_joint_that_reads_far_outside_its_range_is_named():
    with pytest.raises(UnsafeCommandError, match="knee"):
        CommandLimiter(meta(), PERIOD)(np.zeros(2), np.array([0.0, 3.0]), np.zeros(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("place", range(3))
def test_what_is_no_number_is_refused_and_changes_nothing(bad, place):
    guard = CommandLimiter(meta(), PERIOD)
    inputs = [np.zeros(2), np.zeros(2), np.zeros(2)]
    inputs[place][1] = bad
    with pytest.raises(UnsafeCommandError):
        guard(*inputs)
    assert not guard.counts.any()
    assert not guard.out.any()


def test_a_blend_rests_at_both_ends():
    start, end, out = np.array([0.0, 1.0]), np.array([2.0, -1.0]), np.zeros(2)
    np.testing.assert_array_equal(blend(start, end, 0.0, out), start)
    np.testing.assert_array_equal(blend(start, end, 7.0, out), end)
    path = np.array([blend(start, end, p, out).copy() for p in np.linspace(0, 1, 101)])
    steps = np.abs(np.diff(path[:, 0]))
    assert steps[0] < 0.05 * steps.max()
    assert steps[-1] < 0.05 * steps.max()
    assert len(JOINTS) == path.shape[1]
