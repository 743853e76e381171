"""The best evaluation of a run so far: whose checkpoint is kept, and when a better one is no longer waited for.

`checkpoint.keep_best` names the held-out number, `eval.patience` how many evaluations may pass without a better one
(docs/protocol.md, 6 and 9). Both are functions of the evaluations alone, so a resumed run stops where it would have.
"""

import dataclasses
import math
from collections.abc import Container, Iterable, Mapping, Sequence

from plm.errors import UserError

SELECTS = "selects"  # the task's metric that selects


@dataclasses.dataclass
class Best:
    """name: of the number, without "eval/"; lower: whether less is better; since: evaluations after the best one."""

    name: str
    lower: bool
    patience: int = 0
    step: int | None = None
    value: float | None = None
    since: int = 0

    def add(self, step: int, values: Mapping[str, float]) -> bool:
        """Takes {"eval/name": value} of an evaluation; whether it is the best so far. A tie leaves the earlier one."""
        value = values[f"eval/{self.name}"]
        value = math.nan if value is None else value
        better = math.isfinite(value) and (
            self.value is None or (value < self.value if self.lower else value > self.value)
        )
        if better:
            self.step, self.value, self.since = step, value, 0
        else:
            self.since += 1
        return better

    def replay(self, lines: Iterable[Mapping], start: int, saved: Container[int]) -> "Best":
        """Takes the evaluations that a run had done when it was at step `start`; lines: of metrics.jsonl; saved: the
        steps that have a checkpoint. Of one without, which was no longer or not yet kept, nothing can be the best."""
        for line in lines:
            if line["step"] <= start and f"eval/{self.name}" in line:
                if line["step"] in saved:
                    self.add(line["step"], line)
                elif self.step is not None:
                    self.since += 1
        return self

    @property
    def exhausted(self) -> bool:
        return bool(self.patience) and self.since >= self.patience

    def record(self) -> dict:
        """For run.json."""
        return {"name": self.name, "step": self.step, "value": self.value}


def make_best(config, losses: Sequence[str], metrics: Sequence[str], *, evaluated: bool) -> Best | None:
    """What the config asks for, None for nothing.

    losses, metrics: the numbers of an evaluation of which less, and of which more is better; of metrics the one that
    selects comes first. evaluated: whether there is held-out text.

    Errors: UserError for a number that no evaluation has, for patience without one, and without held-out text.
    """
    name, patience = config.checkpoint.keep_best, config.eval.patience
    if not name:
        if patience:
            raise UserError(
                f"eval.patience={patience} needs checkpoint.keep_best, which says what has to become better"
            )
        return None
    if not evaluated:
        raise UserError(f"checkpoint.keep_best={name!r} needs held-out text, and nothing is held out")
    known = [*losses, *metrics, *([SELECTS] if metrics else [])]
    if name not in known:
        raise UserError(f"checkpoint.keep_best={name!r} is no held-out number of this run: {', '.join(known)}")
    name = metrics[0] if name == SELECTS else name
    return Best(name, name in losses, patience)
