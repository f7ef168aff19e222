"""The report stands alone, says what was chosen and gives nothing private away; votes are kept and joined."""

import re

import pytest
from evaluation_run import make_run, untrained_clip

from lora_nb import plots, results
from lora_nb.assess import assess
from lora_nb.choose import Choice
from lora_nb.errors import UserError
from lora_nb.evaluate import open_evaluation
from lora_nb.run_report import GRIDS, write_report
from lora_nb.votes import Votes, make_pairs
from lora_nb.widgets import ab_picker


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = make_run(folder)
    evaluation = open_evaluation(run, scorer=str(untrained_clip(folder / "clip")), num_prompts=2, seeds=(1, 2), device="cpu")
    evaluation.measure()
    evaluation.measure([20], (0.8,))
    evaluation.choice = Choice(20, 0.8, "good", "Take step 20 at strength 0.8: it is <the> best.", ["A reason."])
    results.before_after(evaluation, 20)
    results.save_results(evaluation)
    return evaluation


def test_a_run_without_an_evaluation_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="notebook 04"):
        write_report(tmp_path)


def test_the_report_stands_alone_and_is_light(evaluation):
    (evaluation.run_dir / "training_metrics.csv").write_text("step,loss,learning_rate,epoch\n5,0.5,0.001,0.1\n10,0.4,0.001,0.2\n")
    (evaluation.run_dir / "training_summary.txt").write_text("steps  20\n")
    path = write_report(evaluation.run_dir)
    page = path.read_text()
    assert "it is &lt;the&gt; best" in page and "A reason." in page and "zed_man" in page
    assert len(re.findall(r'src="(data:image/)', page)) >= 4 and len(re.findall("src=", page)) == len(re.findall('src="data:', page))
    assert "http" not in re.sub(r"data:image[^\"]*", "", page)
    assert path.stat().st_size < 1_500_000
    assert str(evaluation.run_dir.parent) not in page


def test_plots_take_rows_and_give_figures(evaluation):
    rows = results.read_scores(evaluation.run_dir)
    pictures = results.picture_learning(evaluation)
    figures = [plots.score_curves(rows), plots.score_front(rows), plots.loss_bands(rows), plots.learning_map(pictures, evaluation.steps)]
    for figure in figures:
        figure.canvas.draw()
    assert len(figures) == 4


def test_votes_are_kept_and_joined_with_the_scores(evaluation):
    pairs = make_pairs(evaluation, 12)
    assert pairs == make_pairs(evaluation, 12) and len(pairs) == 12
    assert all(pair.left != pair.right and pair.left_path != pair.right_path for pair in pairs)
    votes = Votes(evaluation.run_dir)
    for pair in pairs:
        votes.add(pair, "left" if pair.left == (20, 1.0) else "right" if pair.right == (20, 1.0) else "same")
    again = Votes(evaluation.run_dir)  # a headless run reads what a hand has left
    assert again.cast == votes.cast
    rows = {(row["step"], row["strength"]): row for row in again.join(results.read_scores(evaluation.run_dir))}
    assert rows[20, 1]["votes_won"] == 1 and rows[20, 1]["votes_won_low"] > 0.2
    assert rows[10, 1]["votes_won"] < 0.6
    assert rows[0, 0]["votes"] == 0
    assert "votes_won" in write_report(evaluation.run_dir).read_text()


def test_the_picker_shows_pairs_blind_and_reports_each_answer(evaluation):
    pairs, heard = make_pairs(evaluation, 2), []
    box = ab_picker(pairs, lambda pair, answer: heard.append((pair, answer)))
    title, pictures, row = box.children
    assert "step" not in title.value + re.sub(r'"data[^"]*"', "", pictures.value)
    row.children[0].click()
    row.children[2].click()
    row.children[1].click()  # nothing is left to judge
    assert heard == [(pairs[0], "left"), (pairs[1], "same")]
    assert "Thank you" in title.value and all(button.disabled for button in row.children)


def test_the_whole_evaluation_in_one_call(evaluation):
    choice = assess(evaluation.run_dir, scorer=evaluation.embedder.name, num_prompts=2, seeds=(1, 2), device="cpu", strengths=(0.8,))
    assert choice.sentence in (evaluation.run_dir / "evaluation" / "report.html").read_text()
    assert {path.stem for path in (evaluation.folder / "grids").iterdir()} == set(GRIDS)
