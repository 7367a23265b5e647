"""Reports of evaluations and comparisons: JSON data with a table, a picture and a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metarobot.evaluation.tables import comparison_table, evaluation_table
from metarobot.files import write_json


class EvaluationReport:
    """What an evaluation found.

    ``report["episodes"]`` and the other keys are those of the JSON file that
    ``metarobot evaluate --json`` writes.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = dict(data)
        """The report as JSON data."""

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def __repr__(self) -> str:
        data = self.data
        return f"<{type(self).__name__} {data['family']}, {data['tasks']} {data['split']} tasks>"

    def table(self) -> str:
        """Return the report as a text table, as the terminal shows it."""
        return evaluation_table(self.data)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all.

        Raises:
            FileError: The file cannot be written.
        """
        write_json(Path(path), self.data)

    def plot(self, path: str | Path) -> None:
        """Draw return against episodes of experience, to a .png, .svg or .pdf.

        Raises:
            CheckpointError: Another suffix.
            FileError: The file cannot be written.
        """
        from metarobot.evaluation.plots import plot_evaluation  # matplotlib starts slowly

        plot_evaluation(self.data, Path(path))


class ComparisonReport(EvaluationReport):
    """What a comparison of agents found; ``report["agents"]`` holds one entry an agent."""

    def table(self) -> str:
        """Return the comparison as a text table, best agent first."""
        return comparison_table(self.data)

    def plot(self, path: str | Path) -> None:
        """Draw return against episodes of experience for every agent, to a .png, .svg or .pdf.

        Raises:
            CheckpointError: Another suffix.
            FileError: The file cannot be written.
        """
        from metarobot.evaluation.plots import plot_comparison  # matplotlib starts slowly

        plot_comparison(self.data, Path(path))
