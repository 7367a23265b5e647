"""The run's log, its replay and the terminal panel."""
