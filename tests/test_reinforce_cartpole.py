"""reinforce_cartpole.py: returns and gradients by hand, the trap, the differences it lists."""

import numpy as np
import oracles
import pytest
import tensorflow as tf
from helpers import run_main

import reinforce_cartpole as script

keras = script.keras


def episode(length, seed=0):
    """Return states (length, 4), actions and returns (length,), made up."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(length, 4)).astype("float32")
    return states, rng.integers(0, 2, length), rng.normal(size=length)


def new_network():
    keras.utils.set_random_seed(1)
    return script.build_model()


def gradient_of_update(network, *episode):
    """Return the loss of an episode, and what update_network climbs down."""
    tensors = script.pad_episode(*episode)
    return oracles.gradient_of(network, lambda sgd: script.update_network(network, sgd, *tensors))


def test_returns_of_the_articles_four_steps():
    # G3 = 4, G2 = 3 + 4/2, G1 = 2 + 3/2 + 4/4, G0 = 1 + 2/2 + 3/4 + 4/8
    assert script.discounted_returns([1, 2, 3, 4], 0.5).tolist() == [3.25, 4.5, 5.0, 4.0]
    assert script.discounted_returns([1, 2, 3, 4], 0).tolist() == [1, 2, 3, 4]
    assert script.discounted_returns([1, 2, 3, 4], 1).tolist() == [10, 9, 7, 4]


def test_standardise_by_hand():
    np.testing.assert_allclose(script.standardise(np.array([1.0, 3.0])), [-1, 1])
    root = np.sqrt(1.5)  # of 0, 1, 2 the variance is 2 / 3
    np.testing.assert_allclose(script.standardise(np.array([0.0, 1.0, 2.0])), [-root, 0, root])


def test_network_is_the_articles():
    network = new_network()
    assert [w.shape for w in network.get_weights()[::2]] == [(4, 30), (30, 30), (30, 2)]
    np.testing.assert_allclose(np.sum(network(episode(9)[0]), axis=1), 1, rtol=1e-6)  # softmax
    hidden = np.concatenate([script.build_model().get_weights()[2].ravel() for _ in range(20)])
    assert np.std(hidden) == pytest.approx(np.sqrt(2 / 30), rel=0.02)  # He: sqrt(2 / inputs)


def test_actions_follow_the_policy():
    network = new_network()
    policy, _ = script.compile_agent(network)
    state = np.array([0.3, -1.0, 0.2, 2.0], "float32")
    probabilities = network(state[None]).numpy()[0]
    drawn = [script.get_action(policy, state) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(probabilities[1], abs=0.05)  # four standard errors
    network.set_weights([weight * 0 for weight in network.get_weights()])
    np.testing.assert_allclose(policy(tf.constant(state[None])), [[0.5, 0.5]])  # sees new weights


# --- Differences from the article ---
@pytest.mark.parametrize("length", [1, 7, 200])
def test_differences_1_and_3_the_gradient_is_the_score_functions(length):
    """The episode is padded to 200 steps, and the oracle's is not."""
    network, (states, actions, returns) = new_network(), episode(length)
    loss, gradient = gradient_of_update(network, states, actions, returns)
    # -mean(G log p(a|s)), in float64, forward and back by hand
    outputs, rows = oracles.mlp(states, network.get_weights()), np.arange(length)
    p = oracles.softmax(outputs[-1])
    expected_loss = -np.mean(returns * np.log(p[rows, actions]))
    delta = returns[:, None] * (p - np.eye(2)[actions]) / length
    expected = oracles.mlp_gradients(outputs, network.get_weights(), delta)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    for part, other in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(part, other, atol=2e-6 * np.abs(other).max() + 1e-6)


def test_difference_1_the_trap_by_hand():
    """The docstring's numbers. Should Keras mend its fused gradient, this test will say so."""
    states, actions = np.ones((5, 4), "float32"), np.array([0, 0, 1, 0, 1])
    returns = np.array([3, 1, 0, -1, -2], "float32")
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(2, activation="softmax", kernel_initializer="zeros")(inputs)
    network = keras.Model(inputs, outputs)
    loss, (_, right) = gradient_of_update(network, states, actions, returns)
    assert float(loss) == pytest.approx(np.mean(returns) * np.log(2))
    np.testing.assert_allclose(right, [-0.5, 0.5], atol=1e-6)
    network.compile(loss="categorical_crossentropy", optimizer=keras.optimizers.SGD(1.0))
    trap_loss = network.train_on_batch(states, returns[:, None] * np.eye(2)[actions])
    assert float(trap_loss) == pytest.approx(loss)  # nothing looks wrong
    message = "return * one_hot(action) is right in this Keras: tell so in the docstring"
    np.testing.assert_allclose(-network.get_weights()[1], [-0.1, 0.9], 1e-5, err_msg=message)


def test_an_agent_learns():
    final = script.main(["--epochs", "200", "--seed", "2"])["reinforce"]
    assert final["reward"] > 100  # chance gives 22, and so does the trap


def test_difference_2_equal_returns_teach_nothing():
    assert script.standardise(np.full(3, 7.5)).tolist() == [0, 0, 0]
    network = new_network()
    returns = script.standardise(script.discounted_returns([1.0], 0.95))  # an episode of one step
    loss, gradient = gradient_of_update(network, np.ones((1, 4), "float32"), [1], returns)
    assert loss == 0
    assert not any(part.any() for part in gradient)


def test_difference_3_one_update_fits_all_episodes(monkeypatch):
    traced, update_network = [], script.update_network

    def watched(network, optimizer, *tensors):
        traced.append(tensors[0].shape)
        return update_network(network, optimizer, *tensors)

    monkeypatch.setattr(script, "update_network", watched)
    folder, arms = run_main(script, ["--epochs", "20"])
    assert len(set(arms["reinforce"]["history"]["reward"])) > 5  # many lengths
    assert traced == [(200, 4)]  # and one shape
    saved = keras.models.load_model(folder / "reinforce.keras")
    keras.utils.set_random_seed(0)
    first = script.build_model().get_weights()
    assert oracles.smallest_move(saved.get_weights(), first) > 1e-4  # it has learned


def test_difference_4_it_ends(monkeypatch):
    """Max-steps cut the last episode; the reward is the mean of the last hundred."""
    _, arms = run_main(script, ["--epochs", "150", "--max-steps", "2000"])
    rewards = arms["reinforce"]["history"]["reward"]
    assert sum(rewards) == 2000  # a reward of one a step
    assert 100 < len(rewards) < 150
    assert arms["reinforce"]["final"]["reward"] == pytest.approx(np.mean(rewards[-100:]))


@pytest.mark.slow
def test_claim_rewards_climb_with_high_variance():
    """The article's 1,500 episodes, five seeds: all end near 200, and on the way differ widely."""
    runs = run_main(script, ["--runs", "5"])[1]["reinforce"]["runs"]
    assert min(run["final"]["reward"] for run in runs) > 150
    assert np.std([np.mean(run["history"]["reward"][300:500]) for run in runs], ddof=1) > 10
