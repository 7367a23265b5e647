import math

import numpy as np
import pytest
from bridging import JOINTS, LIMIT, meta
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from metarobot.bridge.safety.command_limits import (
    LIMIT_KINDS,
    TORQUE,
    VELOCITY,
    CommandLimiter,
    UnsafeCommandError,
    blend,
)

PERIOD_S = 0.02
KP = 40.0
KD = 1.0
anything = arrays(np.float64, 2, elements=st.floats(allow_nan=True, allow_infinity=True))
likely = arrays(np.float64, 2, elements=st.floats(-3, 3))
speeds = arrays(np.float64, 2, elements=st.floats(-25, 25))


def torque(target: np.ndarray, pos: np.ndarray, vel: np.ndarray) -> np.ndarray:
    """Return τ = kp (target − q) − kd q̇."""
    return KP * (target - pos) - KD * vel


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(anything | likely, anything | likely, anything | speeds), min_size=1, max_size=5
    )
)
def test_whatever_comes_in_what_goes_out_is_finite_and_within_limits(steps):
    limiter = CommandLimiter(meta(), PERIOD_S, rate=1.0)
    last = None
    for target, pos, vel in steps:
        try:
            out = limiter(target, pos, vel).copy()
        except UnsafeCommandError:
            continue
        assert np.isfinite(out).all()
        assert (out >= LIMIT["low"]).all()
        assert (out <= LIMIT["high"]).all()
        applied = torque(out, pos, vel)
        assert (np.abs(applied) <= LIMIT["torque"] * (1 + 1e-9)).all()
        # A joint that is too fast is not driven on
        assert (applied[vel > LIMIT["velocity"]] <= 1e-9).all()
        assert (applied[vel < -LIMIT["velocity"]] >= -1e-9).all()
        if last is not None:
            # Faster than the rate limit only where another limit made it
            fast = np.abs(out - last) > LIMIT["velocity"] * PERIOD_S + 1e-12
            assert (limiter.hit[VELOCITY] | limiter.hit[TORQUE])[fast].all()
        last = out


@given(anything, st.floats(-2, 2), st.floats(-2, 2))
def test_a_command_without_joints_stays_in_its_range(target, a, b):
    low, high = min(a, b), max(a, b) + 0.1
    about = meta(
        layout="direct", action=meta().action.__class__(("x", "y"), (low, low), (high, high))
    )
    limiter = CommandLimiter(about, PERIOD_S)
    try:
        out = limiter(target, np.zeros(2), np.zeros(2))
    except UnsafeCommandError:
        assert not math.hypot(*target) < 1e9
        return
    np.testing.assert_array_equal(out, np.clip(target, low, high))


def test_what_is_within_all_limits_goes_through_untouched():
    limiter = CommandLimiter(meta(), PERIOD_S)
    target = np.array([0.1, -0.3])
    np.testing.assert_array_equal(limiter(target, np.zeros(2), np.zeros(2)), target)
    assert not limiter.counts.any()
    assert limiter.report() == {}


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
    limiter = CommandLimiter(meta(), PERIOD_S)
    out = limiter(np.array([target, 0.0]), np.array([pos, 0.0]), np.array([vel, 0.0]))
    assert out[0] == pytest.approx(expected)
    assert limiter.report() == {"hip": {kind: 1}}
    assert limiter.bits().tolist() == [1 << LIMIT_KINDS.index(kind), 0]


def test_a_target_moves_at_the_joints_own_speed_at_most():
    limiter = CommandLimiter(meta(), PERIOD_S, rate=0.5)
    limiter.begin(np.zeros(2))
    for i in range(1, 4):
        out = limiter(np.array([0.45, 0.0]), np.zeros(2), np.zeros(2))
        assert out[0] == pytest.approx(0.1 * i)
    assert limiter.report() == {"hip": {"rate": 3}}


def test_a_joint_that_reads_far_outside_its_range_is_named():
    with pytest.raises(UnsafeCommandError, match="knee"):
        CommandLimiter(meta(), PERIOD_S)(np.zeros(2), np.array([0.0, 3.0]), np.zeros(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("place", range(3))
def test_what_is_no_number_is_refused_and_changes_nothing(bad, place):
    limiter = CommandLimiter(meta(), PERIOD_S)
    inputs = [np.zeros(2), np.zeros(2), np.zeros(2)]
    inputs[place][1] = bad
    with pytest.raises(UnsafeCommandError):
        limiter(*inputs)
    assert not limiter.counts.any()
    assert not limiter.out.any()


def test_a_blend_rests_at_both_ends():
    start, end, out = np.array([0.0, 1.0]), np.array([2.0, -1.0]), np.zeros(2)
    np.testing.assert_array_equal(blend(start, end, 0.0, out), start)
    np.testing.assert_array_equal(blend(start, end, 7.0, out), end)
    path = np.array([blend(start, end, p, out).copy() for p in np.linspace(0, 1, 101)])
    steps = np.abs(np.diff(path[:, 0]))
    assert steps[0] < 0.05 * steps.max()
    assert steps[-1] < 0.05 * steps.max()
    assert len(JOINTS) == path.shape[1]
