"""The numbers in README.md and docs/results/README.md are those of the runs in docs/results."""

import importlib
import itertools
import json
import re
import statistics

import pytest
from helpers import ROOT, SCRIPTS, parser_of

RESULTS = ROOT / "docs" / "results"
TABLES = (RESULTS / "README.md").read_text()

HOW = {  # the values of all runs and the number of digits -> text
    "mean": lambda v, n: f"{statistics.mean(v):.{n}f}",
    "spread": lambda v, n: f"{statistics.mean(v):.{n}f} +- {statistics.stdev(v):.{n}f}",
    "extent": lambda v, n: f"{min(v):.{n}f} to {max(v):.{n}f}",
    "largest": lambda v, n: f"{max(v):.{n}g}",
}
WHAT = {  # the record of an arm -> a value, where that is not simply a final number
    "late": lambda arm: statistics.mean(arm["history"]["reward"][100:]),
    "last100": lambda arm: statistics.mean(arm["history"]["reward"][-100:]),
    "first50": lambda arm: statistics.mean(arm["history"]["reward"][:50]),
    "games": lambda arm: len(arm["history"]["reward"]),
    "random_games": lambda arm: arm["history"]["avg loss"].count(None),
    "slope_off": lambda arm: missed(arm["estimates"], "slope"),
    "intercept_off": lambda arm: missed(arm["estimates"], "intercept"),
    "band": lambda arm: 100 * arm["estimates"]["fit"]["coverage"],
    "band_converged": lambda arm: 100 * arm["estimates"]["converged"]["coverage"],
}
ACCURACY = "sparse_categorical_accuracy"
ROWS = [  # a script, its files, arms: what, how, digits
    ("mnist_eager_mlp", ".*", "mlp", "test_accuracy extent 4, loss extent 3"),
    ("metrics_summaries", ".*", "fit", f"{ACCURACY} mean 3, val_{ACCURACY} spread 3"),
    ("metrics_summaries", ".*", "fit", "std_of_conv2d_kernel mean 2"),
    ("metrics_summaries", ".*", "loop", "test_accuracy spread 3"),
    ("gap_cats_dogs", ".*", "fc fc_dropout gap", "accuracy mean 3, val_accuracy spread 3"),
    ("transfer_resnet50", ".*", "cnn", "accuracy spread 3, val_accuracy spread 3"),
    ("transfer_resnet50", ".*", "cnn", "test_accuracy spread 3"),
    ("resnet_cifar10", ".*", "resnet plain", "acc spread 3, val_acc spread 3"),
    ("double_q_cartpole", ".noise", "double dqn", "episodes_to_180 spread 0, late mean 0"),
    ("dueling_q_cartpole", "", "double dueling", "late mean 0"),
    ("dueling_q_spaceinvaders", "", "dueling", "random_reward mean 0, random_games mean 0"),
    ("dueling_q_spaceinvaders", "", "dueling", "first50 mean 0, last100 mean 0, games mean 0"),
    ("dueling_q_spaceinvaders", "", "dueling", "greedy_reward mean 0, epsilon_reward mean 0"),
    ("dueling_q_spaceinvaders", ".longer", "dueling", "last100 mean 0, games mean 0"),
    ("dueling_q_spaceinvaders", ".longer", "dueling", "greedy_reward mean 0"),
    ("dueling_q_spaceinvaders", ".longer", "dueling", "epsilon_reward mean 0"),
    ("reinforce_cartpole", ".*", "reinforce", "reward spread 1"),
    ("keras_pg_weighted_ce", ".seed?", "identity", "weighted_error largest 2, slope extent 2"),
    ("keras_pg_weighted_ce", ".seed?", "agent", "reward spread 1"),
    ("keras_pg_weighted_ce", ".pong", "agent", "last100 mean 1, games mean 0"),
    ("bayes_mle", ".seed?", "constant_noise", "slope_off largest 1, intercept_off largest 2"),
    ("bayes_mle", ".seed?", "growing_noise", "band extent 0"),
    ("bayes_mle", ".converge.*", "growing_noise", "band_converged extent 0"),
]
IN_README = [
    ("metrics_summaries", ".*", "fit", f"val_{ACCURACY} mean 3"),
    ("keras_pg_weighted_ce", ".seed?", "agent", "reward mean 0"),
    ("keras_pg_weighted_ce", ".pong", "agent", "last100 mean 1, games mean 0"),
]
# What has changed since the kept runs: None, which counts the same steps, and flags not used there
OLDER = {"mnist_eager_mlp": 600, "metrics_summaries": 156}  # steps_per_epoch
NEWER = {"keras_pg_weighted_ce": {"runs": 1}, "reinforce_cartpole": {"gif": False}}


def missed(estimates, name):
    return abs(estimates["fit"][name] - estimates["least squares"][name])


def texts(script, files, arms, entries):
    """Return the texts of an entry of ROWS: each is over all the runs of an arm."""
    runs = [json.loads(p.read_text())["arms"] for p in RESULTS.glob(f"{script}{files}.json")]
    for arm, entry in itertools.product(arms.split(), entries.split(", ")):
        records = [run[arm].get("runs", [run[arm]]) for run in runs if arm in run]
        what, how, digits = entry.split()
        value = WHAT.get(what, lambda record, name=what: record["final"][name])
        yield HOW[how]([value(record) for record in itertools.chain(*records)], digits)


def stands_in(number, text):
    return re.search(rf"(?<![\d.]){re.escape(number)}(?!\.?\d)", text)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_of_claims_was_measured(script):
    module = importlib.import_module(script)
    article, here = re.findall(rf"^\| `{script}\.py` \|.*\|(.*)\|(.*)\|.*\|$", TABLES, re.M)[0]
    numbers = [text for entry in ROWS if entry[0] == script for text in texts(*entry)]
    assert [number for number in numbers if not stands_in(number, here)] == []
    assert set(re.findall(r"\d+\.\d+", here)) <= set(re.findall(r"\d+\.\d+", " ".join(numbers)))
    for metrics in module.ARTICLE.values():
        assert all(stands_in(f"{value:g}", article) for value in metrics.values())
    assert all(pair in TABLES for pair in re.findall(r"\d\S* \+- [\d.]+\d", module.__doc__))


@pytest.mark.parametrize(("noise", "file"), [(0, ".plain"), (1, ".noise"), (3, ".noise3")])
def test_the_table_of_overestimation_was_measured(noise, file):
    for arm in ("dqn", "dqn_target", "double"):
        record = json.loads((RESULTS / f"double_q_cartpole{file}.json").read_text())["arms"][arm]
        values = [run["final"]["overestimation"] for run in record["runs"]]
        spread, median = HOW["spread"](values, 1), f"{statistics.median(values):.1f}"
        assert f"| {noise} | `{arm}` | {spread} | {median} |" in TABLES


def test_the_table_of_the_validations_lag_was_measured():
    runs = [json.loads(path.read_text()) for path in RESULTS.glob("metrics_summaries.*.json")]
    epochs = zip(*[run["arms"]["fit"]["history"][f"val_{ACCURACY}"] for run in runs])
    cells = " | ".join(HOW["extent"](values, 2) for values in epochs)
    assert f"| `metrics_summaries.py`, seeds 0 to 2 | {cells} |" in TABLES


def test_readme_repeats_what_was_measured():
    readme = (ROOT / "README.md").read_text()
    assert all(stands_in(text, readme) for entry in IN_README for text in texts(*entry))


def test_each_file_is_of_a_whole_run_on_real_data_by_its_command(monkeypatch):
    rows = re.findall(r"^\| `(\S+)`.*? \| `python (\w+)\.py ?(.*)` \|$", TABLES, re.M)
    commands = {name: (script, flags) for name, script, flags in rows}
    found = {path: re.sub(r"seed\d", "seedN", path.name) for path in RESULTS.glob("*.json")}
    assert set(commands) == set(found.values())
    for path, name in found.items():
        results, (script, flags) = json.loads(path.read_text()), commands[name]
        flags = flags.replace("N", str(re.search(r"seed(\d)|$", path.name)[1]))
        config = vars(parser_of(script, monkeypatch).parse_args(flags.split()))
        if script in OLDER and config["steps_per_epoch"] is None:
            config["steps_per_epoch"] = OLDER[script]
        assert results["script"] == script
        assert NEWER.get(script, {}) | results["config"] == config  # no folder of the machine
        assert results["complete"]
        assert results["data"] != "synthetic"
