"""Around a run: child processes, the log and its replay, and the terminal panel."""
