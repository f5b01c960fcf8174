"""The numbers in README.md and docs/results/README.md are those of the runs in docs/results."""

import importlib
import json
import math
import re
import statistics

import pytest
from helpers import ACCURACY, KERNEL, ROOT, parser_of

RESULTS = ROOT / "docs" / "results"
TABLES = (RESULTS / "README.md").read_text()

HOW = {  # the values of all runs and the number of digits -> text
    "mean": lambda v, n: f"{statistics.mean(v):.{n}f}",
    "median": lambda v, n: f"{statistics.median(v):.{n}f}",
    "spread": lambda v, n: f"{statistics.mean(v):.{n}f} +- {statistics.stdev(v):.{n}f}",
    "extent": lambda v, n: f"{min(v):.{n}f} to {max(v):.{n}f}",
    "largest": lambda v, n: f"{max(v):.{n}g}",
    "sum": lambda v, n: f"{sum(v)} of {len(v)}",
}
WHAT = {  # the record of a training -> a value, where that is not simply a final number
    "first100": lambda record: statistics.mean(record["history"]["reward"][:100]),
    "late": lambda record: statistics.mean(record["history"]["reward"][100:]),
    "last100": lambda record: statistics.mean(record["history"]["reward"][-100:]),
    "games": lambda record: len(record["history"]["reward"]),
    "passes": lambda record: record["final"]["episodes_to_180"] or math.inf,
    "random": lambda record: statistics.mean(untrained(record["history"])),
    "slope_off": lambda record: missed(record["estimates"], "slope"),
    "intercept_off": lambda record: missed(record["estimates"], "intercept"),
    "band": lambda record: 100 * record["estimates"]["fit"]["coverage"],
    "band_converged": lambda record: 100 * record["estimates"]["converged"]["coverage"],
}
ROWS = [  # script, files, arm, the row's label, metric, how, digits
    ("mnist_eager_mlp", "*", "mlp", "test accuracy", "test_accuracy", "extent", 4),
    ("mnist_eager_mlp", "*", "mlp", "loss", "loss", "extent", 3),
    ("metrics_summaries", "*", "loop", "test accuracy", "test_accuracy", "spread", 3),
    ("metrics_summaries", "*", "fit", "training accuracy", ACCURACY, "spread", 3),
    ("metrics_summaries", "*", "fit", "validation accuracy", f"val_{ACCURACY}", "spread", 3),
    ("metrics_summaries", "*", "fit", "kernel's spread", KERNEL, "mean", 3),
    *(
        (script, "*", arm, f"{name} accuracy", metric, "spread", 3)
        for script, arms, metrics in (
            ("gap_cats_dogs", "fc fc_dropout gap", "accuracy val_accuracy"),
            ("transfer_resnet50", "cnn", "accuracy val_accuracy test_accuracy"),
            ("resnet_cifar10", "resnet plain", "acc val_acc"),
        )
        for arm in arms.split()
        for name, metric in zip(("training", "validation", "test"), metrics.split())
    ),
    *(
        ("double_q_cartpole", ".noise", arm, *row)
        for arm in ("dqn", "double")
        for row in (
            ("runs whose mean of 20 episodes passes 180", "reached_180", "sum", 0),
            ("in which episode, median", "passes", "median", 0),
            ("steps, episodes 1 to 100", "first100", "mean", 0),
            ("steps from episode 100 on", "late", "mean", 0),
            ("overestimation", "overestimation", "spread", 1),
            ("overestimation, median", "overestimation", "median", 1),
        )
    ),
    *(
        ("dueling_q_cartpole", "", arm, *row)
        for arm in ("double", "dueling")
        for row in (
            ("runs whose mean of 20 episodes passes 180", "reached_180", "sum", 0),
            ("steps from episode 100 on", "late", "mean", 0),
        )
    ),
    ("dueling_q_spaceinvaders", "", "dueling", "random play", "random", "mean", 0),
    ("dueling_q_spaceinvaders", "", "dueling", "games", "games", "mean", 0),
    ("dueling_q_spaceinvaders", "", "dueling", "the last 100 games", "last100", "mean", 0),
    ("reinforce_cartpole", "*", "reinforce", "last 100 episodes", "reward", "spread", 1),
    ("keras_pg_weighted_ce", "*", "identity", "relative error", "weighted_error", "largest", 2),
    ("keras_pg_weighted_ce", "*", "identity", "slope", "slope", "extent", 2),
    ("keras_pg_weighted_ce", "*", "agent", "last 100 episodes", "reward", "spread", 1),
    ("bayes_mle", ".seed*", "constant_noise", "slope missed by", "slope_off", "largest", 1),
    ("bayes_mle", ".seed*", "constant_noise", "intercept missed by", "intercept_off", "largest", 2),
    ("bayes_mle", ".seed*", "growing_noise", "% in the band", "band", "extent", 0),
    ("bayes_mle", ".conv*", "growing_noise", "% when converged", "band_converged", "extent", 0),
]


def untrained(history):
    """Return the rewards of the games before the first training."""
    losses = history["avg loss"]
    return history["reward"][: next(i for i, loss in enumerate(losses) if loss is not None)]


def missed(estimates, name):
    return abs(estimates["fit"][name] - estimates["least squares"][name])


def values(script, files, arm, metric):
    """Return a metric of an arm in all the trainings that are kept."""
    runs = [json.loads(path.read_text())["arms"] for path in RESULTS.glob(f"{script}{files}.json")]
    arms = [run[arm] for run in sorted(runs, key=str) if arm in run]
    trainings = [training for record in arms for training in record.get("runs", [record])]
    what = WHAT.get(metric, lambda record: record["final"][metric])
    return [what(training) for training in trainings]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[i] for i in (0, 2, 3)))
def test_the_table_was_measured(row):
    """The row of this script and arm has this number here, and the article's there."""
    script, files, arm, label, metric, how, digits = row
    here = HOW[how](values(script, files, arm, metric), digits)
    article = importlib.import_module(script).ARTICLE.get(arm, {}).get(metric, "-")
    assert f"| `{script}` | {arm} | {label} | {article} | {here} |" in TABLES.splitlines()


def test_no_row_is_left_over():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]+) \|[^|]+\|[^|]+\|$", TABLES, re.M)
    assert sorted(rows) == sorted((script, arm, label) for script, _, arm, label, *_ in ROWS)


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        ("first100", "steps, episodes 1 to 100"),
        ("late", "steps from episode 100 on"),
        ("episodes_to_180", "episode that passes 180"),
        ("overestimation", "overestimation"),
    ],
)
def test_the_difference_of_the_two_ways_was_measured(metric, label):
    """Double Q minus deep Q, seed by seed, and its standard error."""
    pairs = zip(*(values("double_q_cartpole", ".noise", arm, metric) for arm in ("double", "dqn")))
    differences = [double - dqn for double, dqn in pairs if None not in (double, dqn)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    row = f"| {label} | {statistics.mean(differences):.1f} | {error:.1f} | {len(differences)} |"
    assert row in TABLES.splitlines()


def test_the_table_of_the_validations_lag_was_measured():
    runs = [json.loads(path.read_text()) for path in RESULTS.glob("metrics_summaries.*.json")]
    epochs = zip(*[run["arms"]["fit"]["history"][f"val_{ACCURACY}"] for run in runs])
    cells = " | ".join(HOW["extent"](values, 2) for values in epochs)
    assert f"| `metrics_summaries.py`, seeds 0 to 2 | {cells} |" in TABLES


@pytest.mark.parametrize(
    "script", ["resnet_cifar10", "transfer_resnet50", "reinforce_cartpole", "metrics_summaries"]
)
def test_the_docstrings_numbers_are_in_the_table(script):
    docstring = importlib.import_module(script).__doc__
    for pair in re.findall(r"\d\.\d+ \+- [\d.]+\d", " ".join(docstring.split())):
        assert pair in TABLES


def test_each_file_is_of_a_whole_run_on_real_data_by_its_command(monkeypatch):
    rows = re.findall(r"^\| `(\S+)`.*? \| `python (\w+)\.py ?(.*)` \|$", TABLES, re.M)
    commands = {name: (script, flags) for name, script, flags in rows}
    found = {path: re.sub(r"seed\d", "seedN", path.name) for path in RESULTS.glob("*.json")}
    assert set(commands) == set(found.values())
    for path, name in found.items():
        results, (script, flags) = json.loads(path.read_text()), commands[name]
        flags = flags.replace("N", str(re.search(r"seed(\d)|$", path.name)[1]))
        config = vars(parser_of(script, monkeypatch).parse_args(flags.split()))
        assert results["script"] == script
        for flag, value in config.items():
            # None, a number worked out from the data; a flag may be newer than the run
            same = results["config"].get(flag, value) == value
            assert value is None or same or flag == "gif", (name, flag)  # it changes no number
        assert results["complete"] or script == "dueling_q_spaceinvaders"
        assert results["data"] != "synthetic"
