"""README's table and the scripts' docstrings say what the runs kept in docs/results found."""

import importlib
import json
import re
import statistics

import pytest
from helpers import ROOT

RESULTS = ROOT / "docs" / "results"


def runs(script, which=".seed*"):
    """Return the results.json of the runs <script><which>, in the seeds' order."""
    paths = sorted(RESULTS.glob(f"{script}{which}.json"))
    assert paths, script
    return [json.loads(path.read_text()) for path in paths]


def finals(found, arm, metric):
    return [run["arms"][arm]["final"][metric] for run in found]


def mean(values, digits):
    return f"{statistics.mean(values):.{digits}f}"


def spread(values, digits):
    return f"{statistics.mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"


def rewards(run, arm, first, last=None):
    """Return the mean reward, over an arm's runs, of the episodes from number `first` on."""
    histories = (one["history"]["reward"][first - 1 : last] for one in run["arms"][arm]["runs"])
    return statistics.mean(map(statistics.mean, histories))


def mnist_eager_mlp():
    eager, compiled = (runs("mnist_eager_mlp", which) for which in (".seed*", ".compile*"))
    accuracy = finals(eager + compiled, "mlp", "test_accuracy")
    loss = finals(eager + compiled, "mlp", "loss")
    yield (
        "row",
        f"{min(accuracy):.4f} to {max(accuracy):.4f}, loss {min(loss):.3f} to {max(loss):.3f}",
    )
    yield "docstring", f"{100 * min(accuracy):.2f} to {100 * max(accuracy):.2f} %"


def metrics_summaries():
    found, name = runs("metrics_summaries"), "sparse_categorical_accuracy"
    accuracy, validation = (finals(found, "fit", f"{part}{name}") for part in ("", "val_"))
    yield "row", f"{mean(accuracy, 3)} / {spread(validation, 3)}"
    yield "row", f"kernel {mean(finals(found, 'fit', 'std_of_conv2d_kernel'), 2)}"
    yield "docstring", spread(validation, 3)
    yield "docstring", f"after the loop {spread(finals(found, 'loop', 'test_accuracy'), 3)}"


def photographs(found, arm):
    """Return training / validation accuracy of an arm, and the same with test accuracy."""
    training, test = (mean(finals(found, arm, name), 3) for name in ("accuracy", "test_accuracy"))
    text = f"{training} / {spread(finals(found, arm, 'val_accuracy'), 3)}"
    return text, f"{text} / {test}"


def gap_cats_dogs():
    every, small = runs("gap_cats_dogs", ".*"), runs("transfer_resnet50")
    for arm, name in {"fc": "fc", "fc_dropout": "fc_dropout", "gap": "global pooling"}.items():
        found = [run for run in every if arm in run["arms"]]
        assert sorted(run["config"]["seed"] for run in found) == [0, 1, 2]
        row, docstring = photographs(found, arm)
        yield "row", f"{name} {row}"
        yield "docstring", f"{arm} {docstring}"
    losses = [run["arms"]["fc"]["history"]["val_loss"] for run in every if "fc" in run["arms"]]
    best, last = map(min, losses), (loss[-1] for loss in losses)
    yield "docstring", f"from {min(best):.2f} to {min(last):.2f} and more"
    # the article's 2x2 pooling is its other article's small network: one run shows it
    (seed_1,) = [run for run in every if "avgpool" in run["arms"]]
    assert seed_1["arms"]["avgpool"]["final"] == small[1]["arms"]["cnn"]["final"]
    yield "row", f"2x2 pooling {photographs(small, 'cnn')[0]}"
    yield "docstring", f"avgpool {photographs(small, 'cnn')[1]}"


def transfer_resnet50():
    found, metrics = runs("transfer_resnet50"), ("accuracy", "val_accuracy", "test_accuracy")
    assert len(found) == 3
    training, validation, test = (spread(finals(found, "cnn", name), 3) for name in metrics)
    yield "row", f"small network {training} / {validation} (test {test}; seeds 0 to 2)"
    text = f"{training} in training, {validation} in validation, {test} in test"
    yield "docstring", text


def resnet_cifar10():
    found = runs("resnet_cifar10")
    resnet, plain = (finals(found, arm, "acc") for arm in ("resnet", "plain"))
    valid = [spread(finals(found, arm, "val_acc"), 3) for arm in ("resnet", "plain")]
    train = [spread(values, 3) for values in (resnet, plain)]
    yield "row", f"ResNet {train[0]} / {valid[0]}, plain {train[1]} / {valid[1]}"
    leads = [f"{100 * (ours - theirs):.1f}" for ours, theirs in zip(resnet, plain, strict=True)]
    yield "row", f"ahead by {leads[0]}, {leads[1]} and {leads[2]} points in training"
    yield "docstring", f"training accuracy {train[0]}, plain {train[1]}"
    yield "docstring", f"Validation {valid[0]}, plain {valid[1]}"


def double_q_cartpole():
    (noise,) = runs("double_q_cartpole", ".noise")
    found = {arm: [one["final"] for one in noise["arms"][arm]["runs"]] for arm in noise["arms"]}
    at = {arm: spread([f["episodes_to_180"] for f in found[arm]], 0) for arm in found}
    late = {arm: rewards(noise, arm, 101) for arm in found}
    yield "row", f"passes 180 at number {at['double']}, deep Q's at {at['dqn']}"
    yield "row", f"they hold {late['double']:.0f} and {late['dqn']:.0f} steps"
    yield "docstring", f"180 at episode {at['dqn']}, that of Double Q at {at['double']}"
    early = [f"{rewards(noise, arm, 50, 100):.0f}" for arm in ("dqn", "double")]
    yield "docstring", f"from 50 to 100 they hold {' and '.join(early)} steps"


def dueling_q_cartpole():
    (run,) = runs("dueling_q_cartpole", "")
    late = [f"{rewards(run, arm, 101):.0f}" for arm in ("double", "dueling")]
    yield "row", f"Double Q {late[0]} steps from episode 100 on, Dueling Q {late[1]}"
    yield "docstring", f"{late[0]} and {late[1]} steps from episode 100 on"
    reached = [
        [at for one in run["arms"][arm]["runs"] if (at := one["final"]["episodes_to_180"]) <= 300]
        for arm in ("double", "dueling")
    ]
    assert [len(numbers) for numbers in reached] == [4, 4]
    means = " and ".join(mean(numbers, 0) for numbers in reached)
    yield "row", f"four of five seeds of each pass 180, at episode {means} on average"


def dueling_q_spaceinvaders():
    (run,) = runs("dueling_q_spaceinvaders", "")
    history, final = (run["arms"]["dueling"][part] for part in ("history", "final"))
    points, losses = history["reward"], history["avg loss"]
    at_random = [one for one, loss in zip(points, losses, strict=True) if loss is None]
    start, end, games = mean(at_random, 0), mean(points[-50:], 0), len(points)
    yield "row", f"{start} points in the {len(at_random)} games at random"
    yield "row", f"{end} in the last 50 of {games}; ten greedy games {final['greedy_reward']:.0f}"
    yield "docstring", f"(seed 0, {games} games): {start} points at random, {end} in the last 50"
    yield "docstring", f"greedily {final['greedy_reward']:.0f}"


def reinforce_cartpole():
    halves = runs("reinforce_cartpole")
    found = [one["final"]["reward"] for run in halves for one in run["arms"]["reinforce"]["runs"]]
    assert len(found) == 10
    yield "row", f"{spread(found, 1)} steps in the last 100 of 1,500 episodes (seeds 0 to 9)"


def keras_pg_weighted_ce():
    found = runs("keras_pg_weighted_ce")
    reward = finals(found, "agent", "reward")
    yield "row", f"CartPole {spread(reward, 1)} steps at last"
    yield "docstring", f"CartPole: {min(reward):.0f} to {max(reward):.0f} steps in the last 100"
    slopes = sorted(finals(found, "identity", "slope"))
    yield "docstring", f"falls as N^{slopes[-1]:.2f} to N^{slopes[0]:.2f}"
    assert max(finals(found, "identity", "weighted_error")) < 2.5e-7  # "to 2e-7"
    yield "row", "equal to 2e-7; from N samples it errs by N^-0.5"
    (pong,) = runs("keras_pg_weighted_ce", ".pong")
    played = pong["arms"]["agent"]["history"]["reward"]
    first, last = (statistics.mean(part) for part in (played[:100], played[-100:]))
    yield "row", f"Pong, after {len(played)} games, still lost by {-last:.1f} of 21 points"
    yield "docstring", f"a short run ({len(played)} games, seed 0)"
    yield "docstring", f"still loses by {-last:.1f} points (the first 100 by {-first:.1f})"


def bayes_mle():
    found = runs("bayes_mle")
    estimates = [run["arms"]["constant_noise"]["estimates"] for run in found]
    missed = {
        name: max(abs(one["fit"][name] - one["least squares"][name]) for one in estimates)
        for name in ("slope", "intercept")
    }
    yield "row", f"missed by up to {missed['slope']:.2f} in slope"
    text = f"by up to {missed['slope']:.2f} in slope and {missed['intercept']:.2f} in intercept"
    yield "docstring", text
    coverage = finals(found, "growing_noise", "coverage")
    *first, last = [f"{100 * share:.0f}" for share in coverage]
    yield "docstring", f"holds {', '.join(first)} and {last} % of the points"
    at_last = [run["arms"] for run in runs("bayes_mle", ".converge.seed*")]
    for arms in at_last:
        lines = arms["constant_noise"]["estimates"]
        for name in ("slope", "intercept"):
            assert abs(lines["converged"][name] - lines["least squares"][name]) < 1e-3
    bands = [arms["growing_noise"]["estimates"] for arms in at_last]
    above = [one["fit"]["nll"] - one["converged"]["nll"] for one in bands]
    assert sum(nll > 0.5 for nll in above) == 2
    yield "row", "the second fit far from its maximum for two of five seeds"
    *first, last = [f"{nll:.1f}" if nll > 0.5 else f"{nll:.1g}" for nll in above]
    yield "docstring", f"maximum by {', '.join(first)} and {last} NLL a point"
    coverage = [100 * one["converged"]["coverage"] for one in bands]
    yield "docstring", f"the bands hold {min(coverage):.0f} to {max(coverage):.0f} %"


CHECKED = [
    mnist_eager_mlp,
    metrics_summaries,
    gap_cats_dogs,
    transfer_resnet50,
    resnet_cifar10,
    double_q_cartpole,
    dueling_q_cartpole,
    dueling_q_spaceinvaders,
    reinforce_cartpole,
    keras_pg_weighted_ce,
    bayes_mle,
]


@pytest.mark.parametrize("statements", CHECKED)
def test_what_is_said_was_measured(statements):
    script = statements.__name__
    row = re.search(rf"^\| `{script}\.py` \|.*", (ROOT / "README.md").read_text(), re.M)[0]
    docstring = (ROOT / f"{script}.py").read_text().split('"""')[1]
    texts = {"row": row, "docstring": " ".join(docstring.split())}
    for where, said in statements():
        assert said in texts[where]


def test_each_result_is_of_a_whole_run_on_real_data_by_the_command_named():
    table = (RESULTS / "README.md").read_text()
    rows = re.findall(r"^\| `(\S+)`.*? \| `python (\w+)\.py (.*)` \|$", table, re.M)
    commands = {name: (script, flags) for name, script, flags in rows}
    found = {path: re.sub(r"seed\d", "seedN", path.name) for path in RESULTS.glob("*.json")}
    assert set(commands) == set(found.values())
    for path, name in found.items():
        results, (script, flags) = json.loads(path.read_text()), commands[name]
        seed = re.search(r"seed(\d)|$", path.name)[1]
        args = importlib.import_module(script).parse_args(flags.replace("N", str(seed)).split())
        assert results["script"] == script
        assert results["config"] == vars(args)  # the folder too: nothing of the machine
        assert results["complete"]
        assert results["data"] != "synthetic"
