"""Each script, started as a user starts it, with tiny settings: what a run leaves and shows."""

import json
import re

import helpers
import numpy as np
import pytest
from helpers import CASES, SCRIPTS

Q_TITLE = "CartPole, each step pays N(1, 0)"


def moving(values):
    return [np.mean(values[max(0, i - 19) : i + 1]) for i in range(len(values))]


def histories(run, *arms_and_metrics):
    """Return {arm: the history of a metric}, as a figure of epochs draws it."""
    return {arm: run.results["arms"][arm]["history"][metric] for arm, metric in arms_and_metrics}


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_in_one_folder(smoke_run, script):
    case, run = CASES[script], smoke_run(script)
    assert run.code == 0, run.stderr
    assert run.results["complete"] is True
    assert run.results["script"] == script
    assert run.results["device"] == "CPU"
    assert set(run.results["versions"]) >= {"tensorflow", "numpy"}
    assert list(run.results["arms"]) == list(case.history)
    for arm, record in run.results["arms"].items():
        for training in record.get("runs", [record]):
            assert sorted(training["history"]) == sorted(case.history[arm]), arm
            assert len({len(values) for values in training["history"].values()}) == 1
            assert training["final"]
            assert training["seconds"] > 0
    if "--synthetic" in case.tiny:
        assert (run.results["data"], run.results["article"]) == ("synthetic", {})
    assert re.fullmatch(r"\d{8}-\d{6}(-synthetic)?", run.folder.name)
    assert run.folder.name.endswith("-synthetic") == ("--synthetic" in case.tiny)
    assert list(run.folder.parent.parent.glob("*/*")) == [run.folder]
    files = [path.name for path in run.folder.iterdir() if path.is_file()]
    assert sorted(files) == sorted([*case.files, "results.json"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_printed_at_the_end(smoke_run, script):
    """The table holds the final numbers, arm by arm; each model has a line to paste."""
    run = smoke_run(script)
    lines = run.stdout.splitlines()
    rows = [line.split() for line in lines[lines.index(next(filter(HEAD.match, lines))) + 1 :]]
    for arm, record in run.results["arms"].items():
        article = run.results["article"].get(arm, {})
        for metric, value in record["final"].items():
            row = rows.pop(0)
            assert row[:2] == [arm, metric]
            if value is None:
                assert row[2] == "never"
            else:
                assert float(row[2].replace(",", "")) == pytest.approx(value, rel=6e-4)
            assert row[3] == str(article.get(metric, "-"))
    folder = run.folder.relative_to(run.folder.parents[2]).as_posix()
    assert f'tensorboard --logdir "{folder}"' in lines[-3:]
    for name in CASES[script].files:
        if name.endswith((".keras", ".npz", ".h5")) and "checkpoint" not in name:
            assert any(f'"{folder}/{name}"' in line for line in lines), name


HEAD = re.compile(r"arm +metric +here +article$")


@pytest.mark.parametrize("script", SCRIPTS)
def test_tags_are_the_articles(smoke_run, script):
    run = smoke_run(script)
    for folder, kinds in CASES[script].tags.items():
        found = helpers.tags(run.folder / folder)
        for kind, tags in kinds.items():
            assert found["graph"] if kind == "graph" else tags <= found[kind], (folder, kind)


@pytest.mark.parametrize(
    ("script", "arm", "folder"),
    [
        ("double_q_cartpole", "double", "double/seed_4"),
        ("dueling_q_cartpole", "dueling", "dueling/seed_4"),
        ("reinforce_cartpole", "reinforce", "reinforce/seed_4"),
        ("keras_pg_weighted_ce", "agent", "agent/seed_4"),
        ("dueling_q_spaceinvaders", "dueling", "dueling"),
    ],
)
def test_tensorboard_has_the_episodes_counted_from_one(smoke_run, script, arm, folder):
    run = smoke_run(script)
    record = run.results["arms"][arm]
    rewards = record.get("runs", [record])[-1]["history"]["reward"]
    written = helpers.events(run.folder / folder, "reward")
    assert written == [(i, pytest.approx(reward)) for i, reward in enumerate(rewards, 1)]


# --- Figures ---
@pytest.mark.parametrize(
    "script",
    ["double_q_cartpole", "dueling_q_cartpole", "reinforce_cartpole", "keras_pg_weighted_ce"],
)
def test_reward_figure_of_cartpole(smoke_run, script):
    """The mean of both trainings, then each of them, thin; nothing beyond what was reached."""
    run = smoke_run(script)
    (axes,) = run.figures["reward.png"]
    arm, record = next((a, r) for a, r in run.results["arms"].items() if "runs" in r)
    rewards = [training["history"]["reward"] for training in record["runs"]]
    length = min(map(len, rewards))
    single = [moving(values[:length]) for values in rewards]
    drawn = [values for _, _, values in axes["lines"]]
    np.testing.assert_allclose(drawn, [np.mean(single, axis=0), *single])
    assert axes["lines"][0][1] == list(range(1, length + 1))
    assert axes["legend"] == [f"{arm}, 2 runs"]
    assert (axes["xlabel"], "reward" in axes["ylabel"]) == ("episode", True)
    assert axes["title"] == Q_TITLE if "q_cartpole" in script else "CartPole" in axes["title"]


@pytest.mark.parametrize(
    ("script", "figure", "metrics"),
    [
        ("resnet_cifar10", "training_accuracy.png", ["acc"]),
        ("resnet_cifar10", "validation_accuracy.png", ["val_acc"]),
        ("transfer_resnet50", "training_accuracy.png", ["accuracy"]),
        ("transfer_resnet50", "validation_accuracy.png", ["val_accuracy"]),
        ("gap_cats_dogs", "accuracy.png", ["accuracy", "val_accuracy"]),
        ("gap_cats_dogs", "loss.png", ["loss", "val_loss"]),
    ],
)
def test_figures_of_epochs(smoke_run, script, figure, metrics):
    """Each arm's curve is its history, from epoch 1 on, under its name."""
    run = smoke_run(script)
    found = {}
    for axes in run.figures[figure]:
        assert axes["xlabel"] == "epoch"
        assert axes["ylabel"]
        for (label, epochs, values), text in zip(axes["lines"], axes["legend"], strict=True):
            assert label == text
            assert epochs == list(range(1, len(values) + 1))
            found[tuple(values)] = label
    for arm, record in run.results["arms"].items():
        for metric in metrics:
            label = found.pop(tuple(record["history"][metric]))
            assert label.startswith(arm), (label, arm)
            assert ("valid" in label) == (metric.startswith("val_") and len(metrics) > 1)
    assert not found


def test_figure_of_mnist(smoke_run):
    run = smoke_run("mnist_eager_mlp")
    ((_, epochs, values),) = run.figures["accuracy.png"][0]["lines"]
    accuracy = run.results["arms"]["mlp"]["history"]["accuracy"]
    assert epochs == [1, 2]
    assert np.allclose(values, accuracy) or np.allclose(values, 100 * np.array(accuracy))


def test_figure_of_space_invaders(smoke_run):
    run = smoke_run("dueling_q_spaceinvaders")
    rewards = run.results["arms"]["dueling"]["history"]["reward"]
    games, mean, *_ = run.figures["reward.png"][0]["lines"]
    assert (games[0], mean[0]) == ("a game", "mean of 20 games")
    assert games[1:] == [list(range(1, len(rewards) + 1)), rewards]
    assert mean[2] == pytest.approx(moving(rewards))


def test_figure_of_the_identity(smoke_run):
    run = smoke_run("keras_pg_weighted_ce")
    history = run.results["arms"]["identity"]["history"]
    measured, theory = run.figures["identity.png"][0]["lines"]
    assert measured[1:] == [history["samples"], history["error"]]
    falls = np.array(theory[2]) * np.sqrt(theory[1])
    np.testing.assert_allclose(falls, falls[0])


@pytest.mark.parametrize("script", ["gap_cats_dogs", "transfer_resnet50"])
def test_sample_photographs_are_named(smoke_run, script):
    axes = smoke_run(script).figures["samples.png"]
    assert [each["images"] for each in axes] == [1, 1]
    assert {each["title"] for each in axes} <= {"cat", "dog"}


def test_figures_of_bayes(smoke_run):
    run = smoke_run("bayes_mle")
    assert len(run.figures["prior.png"][0]["lines"]) >= 2
    for arm in helpers.LINES:
        (fit,) = run.figures[f"{arm}_fit.png"]
        labels = [line[0] for line in fit["lines"]] + [band[0] for band in fit["bands"]]
        assert len(fit["legend"]) == len(set(fit["legend"])) >= 3
        assert "truth" in " ".join(labels)
        estimates = run.results["arms"][arm]["estimates"]
        slopes = [(y[-1] - y[0]) / (x[-1] - x[0]) for _, x, y in fit["lines"] if len(x) > 1]
        shown = "converged" if "converged" in estimates else "fit"
        assert any(s == pytest.approx(estimates[shown]["slope"], abs=0.01) for s in slopes)


# --- Flags: each one of a script is in its tiny run, with a value that is not the default ---
def trainings(run):
    (record,) = (record for record in run.results["arms"].values() if "runs" in record)
    return record["runs"]


def epochs_of(run):
    return {len(v) for arm in run.results["arms"].values() for v in arm["history"].values()}


RUNS = {
    "runs": lambda run: [training["seed"] for training in trainings(run)] == [3, 4],
    "gif": lambda run: len(list(run.folder.glob("*.gif"))) == 1,
    "seed": lambda run: trainings(run)[0]["history"] != trainings(run)[1]["history"],
    "max_steps": lambda run: ends_at(run, run.results["config"]["max_steps"]),
    "epochs": lambda run: max(len(t["history"]["reward"]) for t in trainings(run)) > 1,
}


def ends_at(run, steps):
    """Each training ends with the episode that reaches the step."""
    for training in trainings(run):
        rewards = training["history"]["reward"]
        if len(rewards) < run.results["config"]["epochs"]:
            assert sum(rewards) >= steps > sum(rewards[:-1])
    return True


def iterations(run, name):
    """Return how many steps the optimizer of a saved model has taken."""
    import keras

    model = keras.models.load_model(run.folder / name)
    return int(model.optimizer.iterations.numpy())  # it is saved compiled


def game_ends(run):
    return run.results["arms"]["dueling"]["final"]["steps"]


LOOK = {  # {script: {flag: what it alone decides}}
    "resnet_cifar10": {
        "epochs": lambda run: epochs_of(run) == {2},
        "steps_per_epoch": lambda run: iterations(run, "plain.keras") == 2 * 2,
        "arms": lambda run: list(run.results["arms"]) == ["plain"],
    },
    "gap_cats_dogs": {
        "epochs": lambda run: epochs_of(run) == {2},
        "steps_per_epoch": lambda run: iterations(run, "gap.keras") == 2 * 2,
        "arms": lambda run: list(run.results["arms"]) == ["fc", "gap"],
    },
    "transfer_resnet50": {
        "epochs": lambda run: epochs_of(run) == {2},
        "steps_per_epoch": lambda run: iterations(run, "resnet50.keras") == 2 * 2,
        "weights": lambda run: "random" in run.stdout or "none" in run.results["config"]["weights"],
    },
    "mnist_eager_mlp": {
        "epochs": lambda run: len(helpers.events(run.folder / "mlp", "accuracy")) == 2,
    },
    "metrics_summaries": {
        "epochs": lambda run: len(run.results["arms"]["loop"]["history"]["loss"]) == 2,
        "fit_epochs": lambda run: len(run.results["arms"]["fit"]["history"]["loss"]) == 3,
        "steps_per_epoch": lambda run: (
            [step for step, _ in helpers.events(run.folder / "loop", "loss")][-1] <= 30
        ),
    },
    "bayes_mle": {
        "epochs": lambda run: (
            [len(run.results["arms"][arm]["history"]["loss"]) for arm in helpers.LINES] == [4, 8]
        ),
        "converge": lambda run: "converged" in run.results["arms"]["growing_noise"]["estimates"],
    },
    "double_q_cartpole": RUNS
    | {
        "arms": lambda run: list(run.results["arms"]) == ["double"],
        "random_reward_std": lambda run: "N(1, 0)" in run.figures["reward.png"][0]["title"],
    },
    "dueling_q_cartpole": RUNS
    | {
        "arms": lambda run: list(run.results["arms"]) == ["dueling"],
        "random_reward_std": lambda run: "N(1, 0)" in run.figures["reward.png"][0]["title"],
    },
    "reinforce_cartpole": RUNS,
    "keras_pg_weighted_ce": RUNS,
    "dueling_q_spaceinvaders": {
        "max_steps": lambda run: game_ends(run) == 70,
        "gif_every": lambda run: (run.folder / "episode_1.gif").exists(),
        "delay_training": lambda run: "eps: 0.100" in run.stdout,  # epsilon has fallen, so soon
    },
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_changes_what_it_should(smoke_run, script):
    run = smoke_run(script)
    for flag, decides in LOOK[script].items():
        assert decides(run), flag
    config = run.results["config"]
    given = [flag[2:].replace("-", "_") for flag in CASES[script].tiny if flag.startswith("--")]
    assert set(LOOK[script]) <= {*given, "seed"}
    assert config["seed"] == 3


@pytest.mark.parametrize("script", ["mnist_eager_mlp", "bayes_mle"])
def test_another_seed_gives_other_numbers_and_the_same_seed_the_same(script):
    import importlib

    module = importlib.import_module(script)
    first, again, other = (
        json.dumps(
            {
                arm: record["history"]
                for arm, record in helpers.run_main(module, [*CASES[script].tiny, "--seed", seed])[
                    1
                ].items()
            }
        )
        for seed in ("0", "0", "1")
    )
    assert first == again != other


# --- Saved models, in a fresh process ---
EVALUATE = """
import sys, json, numpy as np, {package} as keras, {script} as script
{data}
for path in sys.argv[1:]:
    model = keras.models.load_model(path)
    print(json.dumps(dict(zip(["loss", "accuracy"], model.evaluate({valid}, verbose=0)))))
"""


def test_resnet_evaluates_to_what_was_printed(smoke_run, tmp_path):
    run = smoke_run("resnet_cifar10")
    data = "import argparse\nargs = argparse.Namespace(seed=0, batch_size=8)\n"
    data += "valid = script.make_datasets(*script.load_data(True), args)[1]"
    code = EVALUATE.format(package="keras", script="resnet_cifar10", data=data, valid="valid")
    path = run.folder / "plain.keras"
    loaded = helpers.finish(helpers.start(["-c", code, path], tmp_path), tmp_path)
    assert loaded.code == 0, loaded.stderr
    numbers = json.loads(loaded.stdout.splitlines()[-1])
    final = run.results["arms"]["plain"]["final"]
    assert numbers["accuracy"] == pytest.approx(final["val_acc"], abs=1e-6)
    assert numbers["loss"] == pytest.approx(final["val_loss"], rel=1e-4)
