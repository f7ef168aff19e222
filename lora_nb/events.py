"""What long-running verbs tell whoever is watching, through one callable `on_event(event)`.

A notebook, a terminal and a test each hand in their own; the verbs never print or plot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Progress:
    """`done` of `total` items of `stage` are finished."""

    stage: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class Notice:
    """A sentence the user should read; nothing has failed."""

    message: str


@dataclass(frozen=True)
class Stepped:
    """One optimizer step is done. `loss` is the mean over the step; `seconds` its wall time."""

    step: int
    loss: float
    learning_rate: float
    epoch: float
    seconds: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint is whole on disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class Validated:
    """Validation pictures of `step` are on disk, one a prompt and seed."""

    step: int
    folder: Path
    paths: tuple[Path, ...]


OnEvent = Callable[[object], None]


def ignore(event) -> None:
    """The watcher that does not look."""
