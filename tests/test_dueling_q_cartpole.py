"""dueling_q_cartpole.py's network, example, epsilon; test_double_q_cartpole.py has the rest."""

import re

import helpers
import keras
import numpy as np
import oracles
import pytest

import dueling_q_cartpole as script


def test_networks_are_the_articles():
    hidden = [(n, 30, "relu", "HeNormal") for n in ("dense1", "dense2", "adv_dense", "v_dense")]
    outputs = [("adv_out", 2, "linear", "HeNormal"), ("v_out", 1, "linear", "HeNormal")]
    assert set(oracles.dense_layers(script.DQModel(30, 2, True))) == {*hidden, *outputs}
    assert oracles.dense_layers(script.DQModel(30, 2, False)) == [*hidden[:3], outputs[0]]


def test_q_is_v_plus_the_advantage_over_the_mean_of_the_states_actions():
    model, states = script.DQModel(30, 3, dueling=True), np.eye(4, dtype="float32")
    model.set_weights([np.random.normal(size=weight.shape) for weight in model.get_weights()])
    weights = {layer.name: layer.get_weights() for layer in model.layers}
    trunk = weights["dense1"] + weights["dense2"]
    streams = [trunk + weights[f"{name}_dense"] + weights[f"{name}_out"] for name in ("v", "adv")]
    v, adv = (oracles.mlp(states, stream)[-1] for stream in streams)
    expected = v + adv - adv.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(model(states), expected, rtol=1e-4, atol=1e-3)
    assert np.ptp(adv.mean(axis=1)) > 0.1  # or the batch's mean would do as well


def test_example_by_hand(capsys):
    keras.utils.set_random_seed(0)
    script.show_dueling_example()
    numbers = re.findall(r"-?\d+(?:\.\d+)?", capsys.readouterr().out)
    expected = [10, 50, 100, 53.33, -43.33, -3.33, 46.67, 100, 2, 1, 3.19]  # Clark's formula
    assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.12)


def test_epsilon_falls_without_a_jump(monkeypatch):
    """The article's jumps to its end when 5,000 steps (here 200) have passed, and not 300 more."""
    monkeypatch.setattr(script, "DELAY_TRAINING", 150)
    monkeypatch.setattr(script, "EPSILON_MIN_ITER", 200)
    env = oracles.Scripted(400)
    _, _, (training, _) = oracles.watch_trainings(script, monkeypatch, ["--epochs", "1"], env)
    expected = [1.0] * 150 + [1 - 0.99 * i / 200 for i in range(201)] + [0.01] * 49
    np.testing.assert_allclose([eps for _, eps in training.choices], expected)


@pytest.mark.slow
def test_claim_both_learn_and_neither_is_clearly_ahead():
    """Four of five runs of each pass a mean of 180; the arms differ by less than the spread."""
    _, arms = helpers.run_main(script, ["--epochs", "300", "--runs", "5"])
    late = []
    for record in arms.values():
        assert sum(run["final"]["reached_180"] for run in record["runs"]) >= 4
        late.append([np.mean(run["history"]["reward"][100:]) for run in record["runs"]])
    assert abs(np.mean(late[0]) - np.mean(late[1])) < max(np.std(late, axis=1))
