"""reinforce_cartpole.py and its like in keras_pg_weighted_ce.py, whose file has both trainings."""

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
    network, hidden = script.build_model(), "Dense 30 relu HeNormal"
    assert oracles.layers_as_text(network) == [hidden, hidden, "Dense 2 softmax"]
    sparse = "sparse_" if script is reinforce_cartpole else ""
    assert network.loss == f"{sparse}categorical_crossentropy"
    oracles.check_adam(network.optimizer)


@BOTH
def test_actions_are_drawn_as_by_numpys_choice(script):
    p = np.array([[0.3, 0.7]], "float32")
    keras.utils.set_random_seed(0)
    drawn = [script.get_action(lambda states: tf.constant(p), np.zeros(4)) for _ in range(500)]
    keras.utils.set_random_seed(0)
    assert drawn == [np.random.choice(2, p=p[0]) for _ in range(500)]


def loss_and_gradient(script, network, rewards, states, actions):
    """Return the loss of an update, and the gradient, which is how far plain descent moves."""
    before = network.get_weights()
    network.compile(keras.optimizers.SGD(1.0), network.loss)
    loss = script.update_network(network, rewards, states, actions)
    return loss, [old - new for old, new in zip(before, network.get_weights())]


@BOTH
@pytest.mark.parametrize("length", [2, 7, 200])
def test_difference_1_loss_and_gradient(script, length):
    """They are those of -mean(G log p(a|s)), as a tape sees it, with p not in Keras's own loss."""
    network, states = script.build_model(), np.random.normal(size=(length, 4)).astype("float32")
    rewards, actions = np.random.normal(size=length), np.random.randint(0, 2, length)
    returns = [sum(0.95**k * r for k, r in enumerate(rewards[t:])) for t in range(length)]
    returns = np.float32((returns - np.mean(returns)) / np.std(returns))
    with tf.GradientTape() as tape:
        p = tf.gather(network(states), actions, batch_dims=1)
        expected = -tf.reduce_mean(returns * tf.math.log(p))
    gradient = tape.gradient(expected, network.trainable_variables)
    found = loss_and_gradient(script, network, rewards.tolist(), list(states), actions.tolist())
    assert found[0] == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
    oracles.assert_same(found[1], gradient, atol=5e-6)


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
    loss, gradient = loss_and_gradient(script, script.build_model(), rewards, states, actions)
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
