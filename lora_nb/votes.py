"""Blind comparisons: pairs of pictures at the same prompt and seed, whose makers stay hidden until the vote is cast."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from lora_nb.files import write_json

FILE = "votes.json"
ANSWERS = ("left", "right", "same")


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt and seed; left and right are (step, strength)."""

    prompt: str
    seed: int
    left: tuple[int, float]
    right: tuple[int, float]
    left_path: Path
    right_path: Path


def make_pairs(evaluation, number: int = 12, seed: int = 0) -> list[Pair]:
    """`number` pairs of measured candidates at the plan's prompts and seeds, in an order and on sides drawn from `seed`."""
    rng, names = random.Random(seed), sorted(evaluation.candidates)
    grids = {name: evaluation.draw(*name).pictures for name in names}
    pairs = []
    while len(pairs) < number and len(names) > 1:
        left, right = rng.sample(names, 2)
        row, column = rng.randrange(len(evaluation.plan.prompts)), rng.randrange(len(evaluation.plan.seeds))
        place = evaluation.plan.prompts[row], evaluation.plan.seeds[column]
        pairs.append(Pair(*place, left, right, grids[left][row][column], grids[right][row][column]))
    return pairs


class Votes:
    """votes.json of a run: kept after every vote, read again by a later session or a headless run."""

    def __init__(self, run_dir):
        self.path = Path(run_dir) / "evaluation" / FILE
        self.cast = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else []

    def add(self, pair: Pair, answer: str) -> None:
        """`answer` is "left", "right" or "same"."""
        if answer not in ANSWERS:
            raise ValueError(f"an answer is one of {ANSWERS}, not {answer!r}")
        self.cast.append({"prompt": pair.prompt, "seed": pair.seed, "left": list(pair.left), "right": list(pair.right), "answer": answer})
        write_json(self.path, self.cast)

    def tally(self) -> dict[tuple[int, float], tuple[float, int]]:
        """(step, strength) -> votes won (a draw is half a vote for each) and votes in all."""
        counts: dict[tuple[int, float], tuple[float, int]] = {}
        for vote in self.cast:
            for side, other in (("left", "right"), ("right", "left")):
                name = (int(vote[side][0]), float(vote[side][1]))
                won = {side: 1.0, other: 0.0, "same": 0.5}[vote["answer"]]
                counts[name] = (counts.get(name, (0, 0))[0] + won, counts.get(name, (0, 0))[1] + 1)
        return counts

    def join(self, rows: list[dict]) -> list[dict]:
        """Score rows with votes, and the share won with its 95 % Wilson interval; None where nobody voted."""
        counts = self.tally()
        return [row | _share(*counts.get((row["step"], float(row["strength"])), (0, 0))) for row in rows]


def _share(won: float, number: int) -> dict:
    if not number:
        return {"votes": 0, "votes_won": None, "votes_won_low": None, "votes_won_high": None}
    share, z = won / number, 1.96
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2))
    return {"votes": number, "votes_won": share, "votes_won_low": max(0.0, middle - half), "votes_won_high": min(1.0, middle + half)}
