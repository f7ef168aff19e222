"""Notebook 04 without a browser: from a trained run to its report in one call."""

from lora_nb import results
from lora_nb.choose import Choice, Guards
from lora_nb.evaluate import open_evaluation
from lora_nb.events import ignore
from lora_nb.run_report import write_report


def assess(run_dir, *, strengths=(0.6, 0.8), guards=Guards(), on_event=ignore, **settings) -> Choice:  # noqa: B008  it is frozen
    """Measure, choose, and write grids, scores, choice and report under the run's evaluation/.

    strengths are tried on the best checkpoint, besides 1.0; `settings` are those of `open_evaluation`.
    """
    evaluation = open_evaluation(run_dir, on_event=on_event, **settings)
    evaluation.measure(on_event=on_event)
    best = evaluation.choose(guards).step or evaluation.steps[-1]
    evaluation.measure([best], strengths, on_event=on_event)
    choice = evaluation.choose(guards)
    step, strength = choice.step or best, choice.strength or 1.0
    results.save_results(evaluation)
    results.before_after(evaluation, step, strength)
    results.checkpoint_grid(evaluation)
    results.strength_grid(evaluation, best)
    results.quiet_grid(evaluation, step, strength)
    results.copies_grid(evaluation, step, strength)
    write_report(run_dir)
    evaluation.close()
    return choice
