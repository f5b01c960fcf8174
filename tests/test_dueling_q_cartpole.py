"""dueling_q_cartpole.py's network, and its claim; test_double_q_cartpole.py has the rest."""

import helpers
import numpy as np
import oracles
import pytest

import dueling_q_cartpole as script


def test_networks_are_the_articles():
    hidden, end = "Dense 30 relu HeNormal", "linear HeNormal"
    plain = oracles.layers_as_text(script.DQModel(30, 2, dueling=False))
    assert plain == ["InputLayer", hidden, hidden, hidden, f"Dense 2 {end}"]
    dueling = oracles.layers_as_text(script.DQModel(30, 2, dueling=True))
    assert sorted(dueling) == sorted([*plain, hidden, f"Dense 1 {end}", "Add"])


def test_difference_4_the_mean_is_over_the_actions():
    network, states = script.DQModel(30, 3, dueling=True), np.eye(4, dtype="float32")
    network.set_weights([np.random.normal(size=weight.shape) for weight in network.get_weights()])
    x = network.get_layer("dense2")(network.get_layer("dense1")(states))
    oracles.check_dueling(network, states, x)


@pytest.mark.slow
def test_claim_both_learn_and_neither_is_clearly_ahead():
    """Four of five runs of each pass a mean of 180; the arms differ by less than the spread."""
    _, arms = helpers.run_main(script, ["--epochs", "300", "--runs", "5"])
    late = []
    for record in arms.values():
        assert sum(run["final"]["reached_180"] for run in record["runs"]) >= 4
        late.append([np.mean(run["history"]["reward"][100:]) for run in record["runs"]])
    assert abs(np.mean(late[0]) - np.mean(late[1])) < max(np.std(late, axis=1))
