"""Which checkpoint, at what strength, and why: guards, the Pareto front, one choice, and words for it.

Pure numpy. What is compared is the balance of two shares: how far a candidate has come from the base to the held-out
references (identity), and how much of the base's obedience to the prompt it has kept (adherence).
"""

from dataclasses import asdict, dataclass, field

import numpy as np

from lora_nb.scores import Estimate, bootstrap_means, estimate

LEAST_LIKENESS = 0.5  # of the way from base to references: below it the character is not there yet
LEAST_ADHERENCE = 0.005  # cosine above chance, below which a scorer does not tell prompts apart


@dataclass(frozen=True)
class Candidate:
    """One checkpoint at one strength, with what was measured on it. Grids are [prompts, seeds] in the same order for all."""

    step: int
    strength: float
    identity: np.ndarray
    adherence: np.ndarray
    diversity: np.ndarray  # [prompts]
    leak: np.ndarray  # [leak prompts, seeds]
    drift: np.ndarray  # [leak prompts, seeds]
    copies: float = 0.0
    held_out_loss: float = float("nan")  # ratio to the base
    train_loss: float = float("nan")

    @property
    def name(self) -> str:
        return f"step {self.step}" + ("" if self.strength == 1 else f" at {self.strength:g}")


@dataclass(frozen=True)
class Scale:
    """What 0 and 1 are: identity of the base and of the references among themselves, adherence by chance and of the base."""

    base_identity: np.ndarray  # [prompts, seeds]
    identity_ceiling: float
    adherence_by_chance: float
    base_adherence: np.ndarray  # [prompts, seeds]
    held_out: bool = True  # the references; else they are training pictures


@dataclass(frozen=True)
class Guards:
    """A candidate beyond one of these is not chosen while there is another."""

    copies: float = 0.1  # share of samples that are near copies of a training picture
    leak: float = 0.4  # share of the character in pictures that did not ask for it


@dataclass(frozen=True)
class Choice:
    """One recommendation. step is None if nothing was learned; verdict is a word for programs, the rest is for people."""

    step: int | None
    strength: float | None
    verdict: str  # good, undertrained, overtrained, copies, leaks, learned nothing
    sentence: str
    reasons: list[str] = field(default_factory=list)
    front: list[str] = field(default_factory=list)
    barred: dict[str, str] = field(default_factory=dict)

    def __str__(self):
        return "\n".join([self.sentence, *(f"- {reason}" for reason in self.reasons)])

    def as_dict(self) -> dict:
        return asdict(self)


def choose(candidates: list[Candidate], scale: Scale, guards: Guards = Guards()) -> Choice:  # noqa: B008  it is frozen
    """The candidate with the best balance; of those within one standard error of it the earliest and nearest to 1.0.

    Where even the best is below LEAST_LIKENESS it is taken itself, and called undertrained.
    """
    candidates = sorted(candidates, key=lambda c: (c.step, abs(c.strength - 1)))
    gains = {c.name: estimate(c.identity - scale.base_identity) for c in candidates}
    learned = [c for c in candidates if gains[c.name].low > 0]
    if not learned:
        return _learned_nothing(gains.values())
    barred = {c.name: why for c in candidates if (why := _barred(c, guards))}
    free = [c for c in learned if c.name not in barred]
    # If all are barred, the least offender is still an answer, and the verdict says what is wrong with it.
    pool = free or [min(learned, key=lambda c: max(c.copies / guards.copies, c.leak.mean() / guards.leak))]
    balances = {c.name: _balance_draws(c, scale) for c in pool}
    best = max(pool, key=lambda c: balances[c.name].mean())
    faint = _faint(best, scale)
    chosen = best if faint else next(c for c in pool if _as_good(balances[c.name], balances[best.name]))
    front = [c.name for c in pareto(candidates) if c.name not in barred]
    later = [c for c in candidates if c.step > chosen.step and c.strength == 1]
    earlier = [c for c in candidates if c.step < chosen.step and c.strength == 1]
    turn = _what_went_wrong(chosen, later, guards)
    rising = chosen.step == max(c.step for c in candidates) and _still_rising(chosen, earlier, scale)
    return Choice(
        chosen.step,
        chosen.strength,
        _verdict(chosen, barred, turn, rising or faint),
        f"Take step {chosen.step} at strength {chosen.strength:g}: {_why(chosen, barred) or faint or turn or _nothing_better(later, rising)}.",
        _reasons(chosen, best, earlier, scale, barred, rising or faint),
        front,
        barred,
    )


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in identity and adherence at once."""
    points = [(c.identity.mean(), c.adherence.mean()) for c in candidates]

    def beaten(a):
        return any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in points)

    return [c for c, point in zip(candidates, points, strict=True) if not beaten(point)]


def balance(candidate: Candidate, scale: Scale) -> Estimate:
    """Harmonic mean of the identity and adherence shares, with its interval: 0 as the base draws, 1 ideal."""
    draws = _balance_draws(candidate, scale)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(harmonic(*_own_shares(candidate, scale))), float(low), float(high))


def _own_shares(candidate, scale):
    return shares(candidate.identity.mean(), candidate.adherence.mean(), scale.base_identity.mean(), scale.base_adherence.mean(), scale)


def _balance_draws(candidate, scale) -> np.ndarray:
    grids = candidate.identity, candidate.adherence, scale.base_identity, scale.base_adherence
    return harmonic(*shares(*map(bootstrap_means, grids), scale))


def shares(identity, adherence, base_identity, base_adherence, scale):
    """identity: share of the way from base to references; adherence: share of the base's that is above chance."""
    way = np.maximum(scale.identity_ceiling - base_identity, 1e-6)
    kept = np.maximum(base_adherence - scale.adherence_by_chance, LEAST_ADHERENCE)
    return (identity - base_identity) / way, (adherence - scale.adherence_by_chance) / kept


def harmonic(a, b):
    a, b = np.clip(a, 1e-6, 1), np.clip(b, 1e-6, 1)
    return 2 * a * b / (a + b)


def _as_good(draws, best_draws) -> bool:
    """Within one standard error of the best, on the same bootstrap draws."""
    behind = best_draws - draws
    return behind.mean() <= behind.std() + 1e-9


def _barred(candidate, guards) -> str:
    if candidate.copies > guards.copies:
        return f"{candidate.copies:.0%} of its pictures are near copies of training pictures"
    if (leak := candidate.leak.mean()) > guards.leak:
        return f"{leak:.0%} of the character shows in prompts without the trigger"
    return ""


def _faint(best, scale) -> str:
    """For a run whose best candidate does not show the character yet, in words; "" for any other."""
    likeness, _ = _own_shares(best, scale)
    return f"it is the best so far, but only {max(likeness, 0):.0%} of the way to the character" if likeness < LEAST_LIKENESS else ""


def _what_went_wrong(chosen, later, guards) -> str:
    """The first thing that got clearly worse after the chosen step, in words; "" if nothing did."""
    for c in later:
        if c.copies > max(guards.copies, chosen.copies):
            return "after that the pictures copy the training set"
        if c.leak.mean() > guards.leak:
            return "after that the character shows where nobody called it"
        if estimate(c.adherence - chosen.adherence).high < 0:
            return "after that the pictures follow the prompt less"
        if c.held_out_loss > chosen.held_out_loss * 1.02 and c.train_loss <= chosen.train_loss:
            return "after that training pictures still get easier, but new pictures of the character get harder"
        if estimate(c.identity - chosen.identity).high < 0:
            return "after that the likeness goes down again"
    return ""


def _still_rising(chosen, earlier, scale) -> bool:
    if not earlier:
        return False
    gained = _balance_draws(chosen, scale) - _balance_draws(earlier[-1], scale)
    return bool(np.percentile(gained, 10) > 0)


def _why(chosen, barred) -> str:
    """For a choice that is only the least bad."""
    return f"it is the least bad, but {barred[chosen.name]}" if chosen.name in barred else ""


def _nothing_better(later, rising) -> str:
    if rising:
        return "it is the last step and still clearly better than the one before"
    return "later steps are no better within the uncertainty" if later else "no other has a better balance of likeness and obedience"


def _verdict(chosen, barred, turn, unfinished) -> str:
    if chosen.name in barred:
        return "copies" if "copies" in barred[chosen.name] else "leaks"
    return "undertrained" if unfinished else "overtrained" if turn else "good"


def _reasons(chosen, best, earlier, scale, barred, unfinished) -> list[str]:
    a, b = _own_shares(chosen, scale)
    references = "the held-out references" if scale.held_out else "its training pictures, as none are held out, which flatters a LoRA that copies"
    reasons = [
        f"Likeness: {np.clip(a, 0, 1):.0%} of the way from the base model to {references} "
        f"({estimate(chosen.identity)}; base {scale.base_identity.mean():.3f}, references {scale.identity_ceiling:.3f}).",
        f"Obedience: it keeps {np.clip(b, 0, 1):.0%} of how the base follows prompts ({estimate(chosen.adherence)}; base {scale.base_adherence.mean():.3f}).",
        f"Without the trigger {max(chosen.leak.mean(), 0):.0%} of the character shows, and {chosen.copies:.0%} of its pictures are near copies.",
    ]
    if best.name != chosen.name:
        reasons.append(f"{best.name.capitalize()} measured highest, but not by more than the uncertainty, and less training is safer.")
    if earlier and estimate(earlier[-1].identity - chosen.identity).high < 0:
        reasons.append(f"Before it, at step {earlier[-1].step}, the likeness is clearly lower: undertrained.")
    if others := [f"{name} ({why})" for name, why in barred.items() if name != chosen.name]:
        reasons.append("Not considered: " + "; ".join(others) + ".")
    if scale.base_adherence.mean() - scale.adherence_by_chance < LEAST_ADHERENCE:
        reasons.append("The scorer hardly tells these prompts apart, so obedience is not measured: take other prompts or a larger CLIP.")
    if unfinished:
        reasons.append("Train longer (raise max_steps) and choose again: the best step may not have been reached.")
    return reasons


def _learned_nothing(gains) -> Choice:
    most = max(gains, key=lambda gain: gain.mean)
    return Choice(
        None, None, "learned nothing",
        "Take none: no checkpoint draws the character more than the base model does.",
        [f"The largest gain in likeness is {most}, which may as well be chance.",
         "Raise learning_rate or max_steps, look whether the captions hold the trigger, and whether the loss in notebook 03 went down."],
    )  # fmt: skip
