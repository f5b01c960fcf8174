"""README's table and the scripts' docstrings say what the runs kept in docs/results found."""

import json
import re
import statistics

import pytest
from helpers import ROOT, SCRIPTS

RESULTS = ROOT / "docs" / "results"


def runs(script, which=".seed*"):
    """Return the results.json of the runs <script><which>, in the seeds' order."""
    paths = sorted(RESULTS.glob(f"{script}{which}.json"))
    assert paths, script
    return [json.loads(path.read_text()) for path in paths]


def finals(found, arm, metric):
    return [run["arms"][arm]["final"][metric] for run in found]


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
    yield "row", f"{statistics.mean(accuracy):.3f} / {spread(validation, 3)}"
    yield "row", f"kernel {statistics.mean(finals(found, 'fit', 'std_of_conv2d_kernel')):.2f}"
    yield "docstring", spread(validation, 3)
    yield "docstring", f"after the loop {spread(finals(found, 'loop', 'test_accuracy'), 3)}"


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
    means = [f"{statistics.mean(numbers):.0f}" for numbers in reached]
    yield "row", f"four of five seeds of each pass 180, at episode {' and '.join(means)} on average"


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


CHECKED = [
    mnist_eager_mlp,
    metrics_summaries,
    double_q_cartpole,
    dueling_q_cartpole,
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


def test_results_are_of_whole_runs_on_real_data():
    for path in RESULTS.glob("*.json"):
        results = json.loads(path.read_text())
        assert path.name.startswith(results["script"])
        assert results["script"] in SCRIPTS
        assert results["complete"]
        assert results["data"] != "synthetic"
        assert results["config"]["logdir"] == "log"  # nothing of the machine
        seed = re.search(r"seed(\d+)", path.name)
        assert seed is None or results["config"]["seed"] == int(seed[1])
