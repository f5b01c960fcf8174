"""keras_pg_weighted_ce.py: the identity; and the training of its agent and of REINFORCE's."""

from unittest import mock

import numpy as np
import oracles
import pytest
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


def test_exact_gradient_equals_finite_differences():
    policy, states, rewards = problem()
    W = policy.get_weights()[0].astype("float64")
    exact = script.exact_gradient(oracles.softmax(states @ W), states, rewards)
    for step in 1e-6 * np.random.normal(size=(5, 3, 4)):
        q_up, q_down = oracles.softmax(states @ (W + step)), oracles.softmax(states @ (W - step))
        rise = np.mean(np.sum((q_up - q_down) * rewards, axis=1))
        assert np.sum(2 * step * exact) == pytest.approx(rise)


def test_difference_1_weighted_cross_entropy_has_the_exact_gradient():
    """So it points uphill. Each action in each of 8 states has the weight q f / 8."""
    policy, states, rewards = problem()
    q = policy(states).numpy()
    idx, actions = np.indices(rewards.shape).reshape(2, -1)
    weights = (q * rewards)[idx, actions] / 8
    gradient = script.weighted_ce_gradient(policy, states[idx], np.eye(4)[actions], weights)
    exact = script.exact_gradient(q, states, rewards)
    assert np.linalg.norm(gradient - exact) < 1e-5 * np.linalg.norm(exact)


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


class Game(oracles.Scripted):
    def state(self):  # small, so that the policy stays unsure
        self.now = np.sin(super().state() * np.arange(1, 5, dtype="float32"))
        return self.now

    def step(self, action):  # the states in which the agent acts are kept
        self.seen.append(self.now)
        return super().step(action)


@pytest.mark.parametrize(("script", "arm"), [(reinforce_cartpole, "reinforce"), (script, "agent")])
def test_training_and_differences_3_or_4_and_5(script, arm, monkeypatch):
    lengths = [5, 9, 4, *[3] * 50, 6, *[3] * 53]  # 107 episodes, 333 steps
    updates, update = [], script.update_network
    game = Game(*[1] * (arm == "agent"), *lengths)  # that one is seeded by a reset of its own
    game.seen, make = [], mock.Mock(return_value=game)

    def watched(network, rewards, states, actions):
        p = network(np.array(states)).numpy()[range(len(actions)), actions]
        updates.append((network.get_weights(), rewards, states, actions, p, network))
        return update(network, rewards, states, actions)

    monkeypatch.setattr(script.gymnasium, "make", make)
    monkeypatch.setattr(script, "update_network", watched)
    flags = ["--max-steps", "333", "--runs", "2", "--seed", "7"]
    folder, arms = run_main(script, flags + ["--arms", arm] * (arm == "agent"))
    make.assert_called_with("CartPole-v1", max_episode_steps=200, render_mode="rgb_array")
    first, second = arms[arm]["runs"]
    assert (first["history"]["reward"], second["history"]["reward"]) == (lengths, [3] * 111)
    assert events(folder / arm / "seed_7", "reward") == list(enumerate(lengths, 1))
    assert first["final"] == {"reward": 3.03, "greedy_reward": 3}  # that of the last hundred
    begin, losses = 0, []
    for (_, rewards, states, actions, p, _), length in zip(updates, lengths):
        np.testing.assert_array_equal(states, game.seen[begin : begin + length])
        assert (rewards, actions) == ([1] * length, game.actions[begin : begin + length])
        returns = (1 - 0.95 ** np.arange(length, 0, -1)) / 0.05
        losses.append(-np.mean((returns - returns.mean()) / returns.std() * np.log(p)))
        begin += length
    np.testing.assert_allclose(first["history"]["avg loss"], losses, rtol=1e-3, atol=1e-6)
    network = updates[0][-1]
    best = np.argmax(network(np.array(game.seen[333:363])), axis=1)
    assert game.actions[333:363] == best.tolist()  # ten greedy episodes of 3 steps
    saved = keras.models.load_model(folder / f"{arm}.keras")
    oracles.assert_same(saved.get_weights(), network.get_weights())
    assert int(saved.optimizer.iterations) == len(lengths)
    for seed, start in ((7, updates[0][0]), (8, updates[107][0])):
        keras.utils.set_random_seed(seed)
        oracles.assert_same(start, script.build_model().get_weights())
