"""Keep a robot safe while a policy drives it: one module for each duty.

- ``command_limits``: every command is moved into the joints' limits, or refused; never reshaped.
- ``command_gate``: the only way to the robot; closes for good when readings or commands stop.
- ``guard_process``: a second process, which damps the robot if the controller process dies; the
  controller damps it if the guard does.
- ``emergency_stop``: keys and signals that close the gate, whatever the control loop is doing.
- ``reading_checks`` and ``command_checks``: refuse incomplete, non-finite or stale readings, and
  commands with wrong keys or non-finite numbers.
- ``plausibility_checks``: refuses readings that cannot be true, and notices a fall.

*Damping* is what makes a robot safe: its drives brake (velocity gain) but hold no position.
"""

from metarobot._moved import moved_names

__getattr__ = moved_names(
    __name__,
    "metarobot.bridge.safety.command_limits",
    Filter="CommandLimiter",
    UnsafeError="UnsafeCommandError",
)
