"""What a suite hands back: tidy rows for results.jsonl, tables for people, and how both call things."""

import dataclasses
from collections.abc import Sequence
from typing import Any

MAJORITY = "majority"  # metric TASK/majority/METRIC: of always answering with the commonest class


def row(metric: str, split: str, n: int, value: float) -> dict:
    """n: examples, words or pairs that the value is of."""
    return {"metric": metric, "split": split, "n": int(n), "value": float(value)}


def counts_file(predictions: str) -> str:
    """Where the counts of examples stand (`plm.analysis.task_metrics.counts`) that belong to a file of predictions."""
    return predictions.rpartition(".")[0] + ".counts.json"


def layer_name(layer: int) -> str:
    return f"layer {layer}" if layer else "embedding"


@dataclasses.dataclass(frozen=True)
class Table:
    """rows: lists of text, numbers and None; a float is shown with four digits, an int whole."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def text(self) -> str:
        """For a terminal, and a table in Markdown."""
        cells = [list(self.columns), *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = [any(isinstance(value, int | float) for value in column) for column in zip(*self.rows, strict=True)]
        right = right or [False] * len(widths)
        rule = [("-" * (width - 1) + ":") if end else "-" * width for width, end in zip(widths, right, strict=True)]
        lines = [
            "| "
            + " | ".join(c.rjust(w) if e else c.ljust(w) for c, w, e in zip(line, widths, right, strict=True))
            + " |"
            for line in [cells[0], rule, *cells[1:]]
        ]
        return "\n".join([self.title, "", *lines])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
