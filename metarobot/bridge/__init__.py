"""Run an exported policy on a robot, with numpy and onnxruntime alone.

- ``launch`` puts a run together, ``controller`` is its control loop, ``run_options`` and
  ``run_report`` are what goes in and comes out.
- ``policy`` is the exported agent, ``layouts`` turn readings into observations and actions into
  commands, ``robots`` are the drivers.
- ``safety`` keeps the robot safe whatever policy, driver or operator do.
- ``adaptation_client`` lets an agent adapt between episodes, in a process that has torch.
"""
