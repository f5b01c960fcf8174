"""reinforce_cartpole.py, and where it does the same keras_pg_weighted_ce.py: the update, the trap.

The training of both is tested in test_keras_pg_weighted_ce.py.
"""

import numpy as np
import oracles
import pytest
import tensorflow as tf
from helpers import run_main

import keras_pg_weighted_ce
import reinforce_cartpole

keras = reinforce_cartpole.keras
BOTH = pytest.mark.parametrize("script", [reinforce_cartpole, keras_pg_weighted_ce])


@BOTH
def test_network_and_difference_2_its_loss(script):
    network = script.build_model()
    layers = [(x.units, x.activation.__name__, type(x.kernel_initializer)) for x in network.layers]
    hidden = (30, "relu", keras.initializers.HeNormal)
    assert layers == [hidden, hidden, (2, "softmax", keras.initializers.GlorotUniform)]
    sparse = "sparse_" if script is reinforce_cartpole else ""
    assert network.loss == f"{sparse}categorical_crossentropy"
    assert isinstance(network.optimizer, keras.optimizers.Adam)
    assert float(network.optimizer.learning_rate) == pytest.approx(0.001)


@BOTH
def test_actions_are_drawn_as_by_numpys_choice(script):
    p = np.array([[0.3, 0.7]], "float32")
    keras.utils.set_random_seed(0)
    drawn = [script.get_action(lambda states: tf.constant(p), np.zeros(4)) for _ in range(500)]
    keras.utils.set_random_seed(0)
    assert drawn == [np.random.choice(2, p=p[0]) for _ in range(500)]


def gradient_of_update(script, rewards, states, actions):
    """Return a network's weights, the loss of an update, and the gradient that it climbs down."""
    keras.utils.set_random_seed(1)
    network = script.build_model()

    def update(sgd):
        network.compile(sgd, network.loss)
        return script.update_network(network, rewards, states, actions)

    return network.get_weights(), *oracles.gradient_of(network, update)


@pytest.mark.parametrize("length", [2, 7, 200])
def test_difference_1_gradient_by_hand_and_the_same_in_both_scripts(length):
    rng = np.random.default_rng(length)
    states = list(rng.normal(size=(length, 4)).astype("float32"))
    rewards, actions = rng.normal(size=length).tolist(), rng.integers(0, 2, length).tolist()
    returns = [sum(0.95**k * r for k, r in enumerate(rewards[t:])) for t in range(length)]
    returns = (returns - np.mean(returns)) / np.std(returns)
    for script in (reinforce_cartpole, keras_pg_weighted_ce):
        weights, loss, gradient = gradient_of_update(script, rewards, states, actions)
        # -mean(G log p(a|s)), in float64, forward and back by hand
        outputs = oracles.mlp(states, weights)
        p = oracles.softmax(outputs[-1])
        expected_loss = -np.mean(returns * np.log(p[range(length), actions]))
        delta = returns[:, None] * (p - np.eye(2)[actions]) / length
        expected = oracles.mlp_gradients(outputs, weights, delta)
        assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
        for part, other in zip(gradient, expected, strict=True):
            np.testing.assert_allclose(part, other, atol=2e-6 * np.abs(other).max() + 1e-6)


def test_difference_1_the_trap_has_the_right_loss_and_the_wrong_gradient():
    """The section's numbers. Should Keras mend its fused gradient, this test will say so."""
    returns, one_hot = np.array([3.0, 1, 0, -1, -2]), np.eye(2)[[0, 0, 1, 0, 1]]
    network = keras.Sequential([keras.layers.Dense(2, "softmax", kernel_initializer="zeros")])
    network.compile(keras.optimizers.SGD(1.0), "categorical_crossentropy")
    loss = network.train_on_batch(np.ones((5, 4)), returns[:, None] * one_hot)
    assert float(loss) == pytest.approx(np.mean(returns) * np.log(2))  # nothing looks wrong
    right = np.mean(returns[:, None] * (one_hot - 0.5), axis=0)
    assert right.tolist() == [0.5, -0.5]
    message = "return * one_hot(action) is right in this Keras: change the comment under Algorithm"
    np.testing.assert_allclose(network.get_weights()[1], [0.1, -0.9], 1e-5, err_msg=message)


@BOTH
@pytest.mark.parametrize("rewards", [[1.0], [2.0, 2.0, 2.0]])
def test_difference_3_equal_returns_teach_nothing(script, monkeypatch, rewards):
    monkeypatch.setattr(script, "GAMMA", 0)
    states, actions = [np.ones(4, "float32")] * len(rewards), [1] * len(rewards)
    _, loss, gradient = gradient_of_update(script, rewards, states, actions)
    assert loss == 0
    assert not any(part.any() for part in gradient)


def test_an_agent_learns():
    final = reinforce_cartpole.main(["--epochs", "100", "--seed", "2"])["reinforce"]
    assert final["reward"] > 50  # here 74; chance gives 22, and so does the trap


@pytest.mark.slow
@BOTH
def test_claim_rewards_climb_with_high_variance(script):
    """The article's 1,500 episodes, five seeds: all end near 200, and on the way differ widely."""
    runs = list(run_main(script, ["--runs", "5"])[1].values())[-1]["runs"]
    assert min(run["final"]["reward"] for run in runs) > 150
    assert np.std([np.mean(run["history"]["reward"][300:500]) for run in runs], ddof=1) > 10
