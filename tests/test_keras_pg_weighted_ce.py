"""keras_pg_weighted_ce.py: the identity; and the training of its agent and of REINFORCE's."""

from unittest import mock

import numpy as np
import oracles
import pytest
import tensorflow as tf
from helpers import events, run_main

import keras_pg_weighted_ce as script
import reinforce_cartpole

keras = script.keras


def problem(seed=0):
    """Return a policy q = softmax(s W), states (8, 3) and known rewards (8, 4)."""
    keras.utils.set_random_seed(seed)
    states, rewards = np.random.normal(size=(8, 3)), np.random.normal(size=(8, 4))
    dense = keras.layers.Dense(4, activation="softmax", use_bias=False)
    return keras.Sequential([keras.Input((3,)), dense]), states, rewards


def test_difference_1_both_gradients_are_that_of_the_mean_reward():
    """So they point uphill. Each action in each of 8 states has the weight q f / 8."""
    policy, states, rewards = problem()
    with tf.GradientTape() as tape:
        q = policy(states)
        mean_reward = tf.reduce_mean(tf.reduce_sum(q * rewards, axis=1))
    expected = tape.gradient(mean_reward, policy.trainable_variables[0])
    exact = script.exact_gradient(q.numpy(), states, rewards)
    np.testing.assert_allclose(exact, expected, rtol=1e-4)
    idx, actions = np.indices(rewards.shape).reshape(2, -1)
    weights = (q.numpy() * rewards)[idx, actions] / 8
    gradient = script.weighted_ce_gradient(policy, states[idx], np.eye(4)[actions], weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)


def test_difference_2_the_sampled_gradients_error_falls_as_one_over_the_root():
    folder, arms = run_main(script, ["--arms", "identity", "--seed", "5"])
    history, final = arms["identity"]["history"], arms["identity"]["final"]
    # The mean square error of one sample, r grad log q(a|s), exactly: all of them are listed.
    policy, states, rewards = problem(5)
    q, mean_square = oracles.softmax(states @ policy.get_weights()[0]), 0
    exact = script.exact_gradient(q, states, rewards)
    for s, a in np.ndindex(rewards.shape):
        one = rewards[s, a] * np.outer(states[s], np.eye(4)[a] - q[s])
        mean_square += q[s, a] / 8 * np.sum((one - exact) ** 2)
    expected = np.sqrt(mean_square / history["samples"]) / np.linalg.norm(exact)
    np.testing.assert_allclose(history["error"], expected, rtol=0.35)
    assert final["slope"] == pytest.approx(-0.5, abs=0.1)
    assert 0 < final["weighted_error"] < 1e-5 < final["sampled_error"] == history["error"][-1]
    logged = zip(history["samples"], map(pytest.approx, history["error"]))
    assert events(folder / "identity", "error") == list(logged)


@pytest.mark.parametrize(("script", "arm"), [(reinforce_cartpole, "reinforce"), (script, "agent")])
def test_training_and_differences_3_or_4_and_5(script, arm, monkeypatch):
    lengths = [5, 9, 4, *[3] * 50, 6, *[3] * 53]  # 107 episodes, 333 steps
    env = oracles.Scripted(*[1] * (arm == "agent"), *lengths)  # that one has a reset before
    get_action = mock.Mock(side_effect=lambda predict, state: np.random.randint(2))
    updates, losses, update = [], [], script.update_network

    def watched_update(network, *episode):
        updates.append((network.get_weights(), *episode))
        losses.append(update(network, *episode))
        return losses[-1]

    monkeypatch.setattr(script.gymnasium, "make", make := mock.Mock(return_value=env))
    monkeypatch.setattr(script, "get_action", get_action)
    monkeypatch.setattr(script, "update_network", watched_update)
    flags = ["--max-steps", "333", "--runs", "2", "--seed", "7"]
    folder, arms = run_main(script, flags + ["--arms", arm] * (arm == "agent"))
    make.assert_called_with("CartPole-v1", max_episode_steps=200, render_mode="rgb_array")
    first, second = arms[arm]["runs"]
    assert first["history"] == {"reward": lengths, "avg loss": losses[:107]}
    assert second["history"]["reward"] == [3] * 111
    assert first["final"] == {"reward": 3.03, "greedy_reward": 3}  # that of the last hundred
    acted = [call.args[1] for call in get_action.mock_calls]
    assert len({state[0] for state in acted}) == 2 * 333  # never in an old state
    begin = 0
    for (_, rewards, states, actions), length in zip(updates, lengths):
        assert (rewards, actions) == ([1] * length, env.actions[begin : begin + length])
        np.testing.assert_array_equal(states, acted[begin : begin + length])
        begin += length
    saved, state = keras.models.load_model(folder / f"{arm}.keras"), np.ones((1, 4), "float32")
    assert int(saved.optimizer.iterations) == len(lengths)
    predict, _ = get_action.mock_calls[0].args
    np.testing.assert_allclose(predict(tf.constant(state)), saved(state), rtol=1e-4)
    for seed, start in ((7, updates[0][0]), (8, updates[107][0])):
        keras.utils.set_random_seed(seed)
        oracles.assert_same(start, script.build_model().get_weights())
