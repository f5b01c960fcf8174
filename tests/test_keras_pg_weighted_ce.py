"""keras_pg_weighted_ce.py: the identity against independent ones, Pong, and the agent's update."""

import numpy as np
import oracles
import pytest
import tensorflow as tf
from helpers import run_main
from oracles import softmax

import keras_pg_weighted_ce as script
import reinforce_cartpole

keras = script.keras


# --- The identity ---
def problem(seed=0):
    """Return a policy q = softmax(s W), states (8, 3) and known rewards (8, 4)."""
    keras.utils.set_random_seed(seed)
    states, rewards = np.random.normal(size=(8, 3)), np.random.normal(size=(8, 4))
    dense = keras.layers.Dense(4, activation="softmax", use_bias=False)
    return keras.Sequential([keras.Input((3,)), dense]), states, rewards


def expected_reward(W, states, rewards):
    return np.mean(np.sum(softmax(states @ W) * rewards, axis=1))


def relative_error(gradient, exact):
    return np.linalg.norm(gradient - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("seed", [0, 1])
def test_exact_gradient_equals_finite_differences(seed):
    policy, states, rewards = problem(seed)
    W = policy.get_weights()[0].astype("float64")
    rises = [
        expected_reward(W + nudge, states, rewards) - expected_reward(W - nudge, states, rewards)
        for nudge in 1e-6 * np.eye(W.size).reshape(-1, *W.shape)
    ]
    gradient = script.exact_gradient(policy(states).numpy(), states, rewards)
    assert relative_error(gradient, np.reshape(rises, W.shape) / 2e-6) < 1e-6


def test_difference_1_weighted_cross_entropy_has_the_exact_gradient():
    """So it points uphill. Each action in each of 8 states has the weight q f / 8."""
    policy, states, rewards = problem()
    q = policy(states).numpy()
    exact = script.exact_gradient(q, states, rewards)
    idx, actions = np.indices(rewards.shape).reshape(2, -1)
    weights = (q * rewards)[idx, actions] / 8
    gradient = script.weighted_ce_gradient(policy, states[idx], np.eye(4)[actions], weights)
    assert relative_error(gradient, exact) < 1e-5


def spread_of_one_sample(policy, states, rewards):
    """Return the root mean square error of one sample's gradient, exactly: each can be listed."""
    q = softmax(states @ policy.get_weights()[0])
    exact, mean_square = script.exact_gradient(q, states, rewards), 0
    for s, a in np.ndindex(rewards.shape):
        one = rewards[s, a] * np.outer(states[s], np.eye(4)[a] - q[s])  # r grad log q(a|s)
        mean_square += q[s, a] / len(states) * np.sum(one**2)
    return np.sqrt(mean_square - np.sum(exact**2)) / np.linalg.norm(exact)


def test_difference_2_the_sampled_gradients_error_falls_as_one_over_the_root():
    _, arms = run_main(script, ["--arms", "identity", "--seed", "5"])
    history, final = arms["identity"]["history"], arms["identity"]["final"]
    assert final["slope"] == pytest.approx(-0.5, abs=0.1)
    assert final["weighted_error"] < 1e-5
    assert history["error"][-1] == final["sampled_error"]
    expected = spread_of_one_sample(*problem(5)) / np.sqrt(history["samples"])
    np.testing.assert_allclose(history["error"], expected, rtol=0.35)


# --- The agent ---
def test_the_update_equals_that_of_reinforce():
    keras.utils.set_random_seed(4)
    network, env = script.build_cartpole_model(), script.make_env("CartPole-v1")
    assert network.count_params() == reinforce_cartpole.build_model().count_params()
    env.reset(seed=4)
    policy = script.compile_policy(network)
    states, actions, rewards = script.collect_episode(env, policy, np.inf)
    returns = script.standardise(script.discounted_returns(rewards, 0.95, pong=False))

    def by_keras(sgd):
        network.compile(sgd, "categorical_crossentropy")
        network.train_on_batch(states, np.eye(2)[actions], sample_weight=returns)

    def by_reinforce(sgd):
        episode = reinforce_cartpole.pad_episode(states, actions, returns)
        reinforce_cartpole.update_network(network, sgd, *episode)

    ours, theirs = (
        np.concatenate([part.ravel() for part in oracles.gradient_of(network, update)[1]])
        for update in (by_keras, by_reinforce)
    )
    assert relative_error(ours, theirs) < 1e-5


def test_difference_3_training_takes_this_step(monkeypatch):
    """main's own update, from its first episode, is train_on_batch with standardised returns."""
    seen, losses, train_on_batch = [], [], keras.Model.train_on_batch

    def watched(self, x, y, sample_weight):
        seen.append((x, y, sample_weight))
        losses.append(-np.mean(sample_weight * np.sum(y * np.log(self(x)), axis=1)))
        return train_on_batch(self, x, y, sample_weight)

    monkeypatch.setattr(keras.Model, "train_on_batch", watched)
    folder, arms = run_main(script, ["--arms", "agent", "--epochs", "50", "--max-steps", "100"])
    assert [len(x) for x, _, _ in seen] == arms["agent"]["history"]["reward"]
    np.testing.assert_allclose(arms["agent"]["history"]["avg loss"], losses, rtol=1e-3, atol=1e-6)
    assert 1 < len(seen) < 50
    assert sum(len(x) for x, _, _ in seen) == 100  # the last episode is cut off
    for states, targets, weights in seen:
        assert set(np.unique(targets)) <= {0, 1}
        assert targets.sum(1).tolist() == [1] * len(states)
        returns = (1 - 0.95 ** np.arange(len(states), 0, -1)) / 0.05  # a reward of one a step
        np.testing.assert_allclose(weights, (returns - returns.mean()) / returns.std(), rtol=1e-6)
    resumed = run_main(script, ["--resume", str(folder)])[1]["agent"]  # nothing is left to play
    assert resumed["history"] == resumed["runs"][0]["history"] == arms["agent"]["history"]
    assert resumed["final"]["greedy_reward"] == arms["agent"]["final"]["greedy_reward"]


def test_returns_by_hand():
    """In Pong a point ends the discounting: three steps to a point won, two to one lost, two."""
    game = np.array([0.0, 0, 1, 0, -1, 0, 1])
    returns = script.discounted_returns(game, 0.5, pong=True)
    assert returns.tolist() == [0.25, 0.5, 1, -0.5, -1, 0.5, 1]
    assert script.discounted_returns(game, 0.5, pong=False)[:2].tolist() == [0.203125, 0.40625]
    np.testing.assert_allclose(script.standardise(np.array([1.0, 3, 1, 3])), [-1, 1, -1, 1])
    assert script.standardise(np.ones(3)).tolist() == [0, 0, 0]


# --- Pong ---
def test_difference_3_pong_steps_once_in_ten_games_even_if_it_was_saved_between():
    keras.utils.set_random_seed(0)
    network = script.build_pong_model()
    assert network.count_params() == 6400 * 200 + 200 + 200 * 2 + 2
    rng = np.random.default_rng(0)
    before, gradients = network.get_weights(), []
    for game in range(10):
        length = 5 + game
        states = rng.normal(size=(length, 6400)).astype("float32")
        targets, weights = np.eye(2)[rng.integers(0, 2, length)], rng.normal(size=length)
        with tf.GradientTape() as tape:
            loss = keras.losses.CategoricalCrossentropy()(targets, network(states), weights)
        gradients.append(tape.gradient(loss, network.trainable_variables))
        oracles.assert_same(before, network.get_weights())  # not yet
        network.train_on_batch(states, targets, sample_weight=weights)
        if game == 6:
            network.save("saved.keras")
            network = keras.models.load_model("saved.keras")
            assert int(network.optimizer.variables[0]) == 7
    for old, new, parts in zip(before, network.get_weights(), zip(*gradients)):
        gradient = np.mean(parts, axis=0)
        step = 1e-4 * gradient / np.sqrt(0.01 * gradient**2 + 1e-7)  # RMSprop's first
        np.testing.assert_allclose(new - old, -step, rtol=1e-3, atol=1e-7)


def court_of(frame):
    """Return the court (80, 80) of a frame (210, 160, 3): what differs from its ground."""
    return np.float32(frame[34:194:2, ::2, 0] != frame[60, 80, 0])


def bat(frame):
    """Return the mean row of the agent's bat in the court of a frame."""
    return np.flatnonzero(court_of(frame)[:, 70:72].any(1)).mean()


@pytest.mark.parametrize(("action", "sign"), [(0, -1), (1, 1)], ids=["up", "down"])
def test_actions_move_the_bat_up_and_down(action, sign):
    env = script.make_env("ALE/Pong-v5")
    env.reset(seed=1)
    for _ in range(40):
        frame, *_ = env.unwrapped.step(0)
    before = bat(frame)
    for _ in range(5):
        env.step(action)
    assert sign * (bat(env.unwrapped.ale.getScreenRGB()) - before) > 10


def test_states_of_pong_are_differences_of_courts():
    env = script.make_env("ALE/Pong-v5")
    state, _ = env.reset(seed=0)
    assert (state.shape, state.dtype, state.any()) == ((6400,), np.float32, False)
    frame = env.render()
    court, moving, grounds = court_of(frame), 0, {int(frame[60, 80, 0])}
    for i in range(80):
        state, *_ = env.step(i % 2)
        frame = env.render()
        new_court = court_of(frame)
        np.testing.assert_array_equal(state, (new_court - court).ravel())
        assert 0 < new_court.sum() < 100  # bats of 16 x 4 pixels at most, and the ball
        assert not new_court.all(1).any()  # the cut leaves neither walls nor the score
        grounds.add(int(frame[60, 80, 0]))
        moving += state.any()
        court = new_court
    assert moving > 30
    assert grounds == {109, 144}  # before the start, and in play


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_claim_the_agent_learns(seed):
    """The network of reinforce_cartpole.py, by Keras's own training, nears 200 steps as well."""
    assert script.main(["--arms", "agent", "--seed", str(seed)])["agent"]["reward"] > 170
