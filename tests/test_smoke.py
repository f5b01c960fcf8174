"""Each script, started as a user starts it, with tiny settings: what a run leaves and shows."""

import argparse
import importlib
import re

import helpers
import keras
import numpy as np
import pytest
from helpers import CASES, SCRIPTS

CARTPOLE = ["double_q_cartpole", "dueling_q_cartpole", "reinforce_cartpole", "keras_pg_weighted_ce"]
Q_TITLE = "CartPole, each step pays N(1, 0)"


def moving(values):
    return [np.mean(values[max(0, i - 19) : i + 1]) for i in range(len(values))]


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
    rows = [line.split() for line in lines]
    rows = rows[rows.index(["arm", "metric", "here", "article"]) + 1 :]
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_tags_are_the_articles(smoke_run, script):
    run = smoke_run(script)
    for folder, kinds in CASES[script].tags.items():
        found = helpers.tags(run.folder / folder)
        for kind, tags in kinds.items():
            assert found["graph"] if kind == "graph" else tags <= found[kind], (folder, kind)


@pytest.mark.parametrize("script", [*CARTPOLE, "dueling_q_spaceinvaders"])
def test_tensorboard_has_the_episodes_counted_from_one(smoke_run, script):
    run = smoke_run(script)
    arm, record = list(run.results["arms"].items())[-1]
    folder = run.folder / arm / ("seed_4" if script in CARTPOLE else "")
    rewards = record.get("runs", [record])[-1]["history"]["reward"]
    written = helpers.events(folder, "reward")
    assert written == [(i, pytest.approx(reward)) for i, reward in enumerate(rewards, 1)]


# --- Figures ---
@pytest.mark.parametrize("script", CARTPOLE)
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
    assert (epochs, values) == ([1, 2], run.results["arms"]["mlp"]["history"]["accuracy"])


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


# --- Flags: each tiny run changes what each of them alone decides ---
def arms(run):
    return list(run.results["arms"])


def recorded(run):
    return helpers.recorded(run.results)


def seeds(run):
    return [training["seed"] for training in run.results["arms"][arms(run)[-1]]["runs"]]


def gifs(run):
    return len(list(run.folder.glob("*.gif")))


def steps_of_the_last_episode(run):
    """Return by how much the first training's steps pass --max-steps; it ends with that episode."""
    rewards = run.results["arms"][arms(run)[-1]]["runs"][0]["history"]["reward"]
    return 0 <= sum(rewards) - run.results["config"]["max_steps"] < rewards[-1]


def steps(run):
    """Return how many steps the last arm's optimizer has taken; it is saved compiled."""
    model = keras.models.load_model(run.folder / f"{arms(run)[-1]}.keras")
    return int(model.optimizer.iterations.numpy())


def title(run):
    return run.figures["reward.png"][0]["title"]


LOOK = [
    ("resnet_cifar10", "epochs", recorded, [2] * 4),
    ("resnet_cifar10", "steps-per-epoch", steps, 2 * 2),
    ("resnet_cifar10", "arms", arms, ["plain"]),
    ("gap_cats_dogs", "epochs", recorded, [2] * 8),
    ("gap_cats_dogs", "steps-per-epoch", steps, 2 * 2),
    ("gap_cats_dogs", "arms", arms, ["fc", "gap"]),
    ("transfer_resnet50", "epochs", recorded, [2] * 8),
    ("transfer_resnet50", "steps-per-epoch", steps, 2 * 2),
    ("mnist_eager_mlp", "epochs", recorded, [2] * 2),
    ("metrics_summaries", "epochs", lambda run: recorded(run)[:2], [2] * 2),
    ("metrics_summaries", "fit-epochs", lambda run: recorded(run)[2:], [3] * 6),
    ("metrics_summaries", "steps-per-epoch", steps, 3 * 15),
    ("bayes_mle", "epochs", recorded, [30, 30, 4, 8]),
    ("bayes_mle", "converge", lambda run: "going on for 16" in run.stdout, True),
    *((script, "runs", seeds, [3, 4]) for script in CARTPOLE),
    *((script, "gif", gifs, 1) for script in CARTPOLE),
    *((script, "max-steps", steps_of_the_last_episode, True) for script in CARTPOLE),
    ("double_q_cartpole", "arms", arms, ["double"]),
    ("double_q_cartpole", "random-reward-std", title, Q_TITLE),
    ("dueling_q_cartpole", "arms", arms, ["dueling"]),
    ("dueling_q_cartpole", "random-reward-std", title, Q_TITLE),
    ("dueling_q_spaceinvaders", "max-steps", lambda run: "step: 70," in run.stdout, True),
    ("dueling_q_spaceinvaders", "gif-every", gifs, 1),
    ("dueling_q_spaceinvaders", "epsilon-min-iter", lambda run: "eps: 0.100" in run.stdout, True),
]


@pytest.mark.parametrize(
    ("script", "flag", "look", "expected"), LOOK, ids=[" ".join(row[:2]) for row in LOOK]
)
def test_each_flag_changes_what_it_should(smoke_run, script, flag, look, expected):
    assert f"--{flag}" in CASES[script].tiny
    assert look(smoke_run(script)) == expected


@pytest.mark.parametrize("script", ["mnist_eager_mlp", "bayes_mle"])
def test_another_seed_gives_other_numbers_and_the_same_seed_the_same(script):
    module, numbers = importlib.import_module(script), []
    for seed in ("0", "0", "1"):
        flags = [flag for flag in CASES[script].tiny if flag != "--converge"]  # it takes long
        _, records = helpers.run_main(module, [*flags, "--seed", seed])
        numbers.append([record["history"] for record in records.values()])
    first, again, other = numbers
    assert first == again != other


# --- A saved model, in another process ---
def test_resnet_evaluates_to_what_was_printed(smoke_run):
    run, script = smoke_run("resnet_cifar10"), importlib.import_module("resnet_cifar10")
    settings = argparse.Namespace(seed=0, batch_size=8)
    _, valid_dataset = script.make_datasets(*script.load_data(True), settings)
    model = keras.models.load_model(run.folder / "plain.keras")
    loss, accuracy = model.evaluate(valid_dataset, verbose=0)
    final = run.results["arms"]["plain"]["final"]
    assert loss == pytest.approx(final["val_loss"], rel=1e-4)
    assert accuracy == pytest.approx(final["val_acc"], abs=1e-6)
