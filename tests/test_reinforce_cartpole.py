"""reinforce_cartpole.py: returns and gradients by hand, the trap, the differences it lists."""

import json

import numpy as np
import pytest
import tensorflow as tf
from helpers import Case, fails_in_one_line

import reinforce_cartpole as script

keras = script.keras

CASE = Case(
    tiny=["--epochs", "12"],
    final_epochs={"reinforce": 12},
    history={"reinforce": ["reward", "avg loss"]},
    events={"reinforce": {"scalars": {"reward", "avg loss"}}},
    figures=["rewards.png"],
    started="/1500",
    again="episode 1:",
    bad_flags=[
        ["--episodes", "0"],
        ["--gamma", "1.5"],
        ["--gamma", "-0.1"],
        ["--runs", "0"],
        ["--max-steps", "0"],
        ["--device", "all"],
    ],
)


def episode(length, seed=0):
    """Return states (length, 4), actions and returns (length,), made up."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(length, 4)).astype("float32")
    return states, rng.integers(0, 2, length), rng.normal(size=length)


def new_network(seed=1):
    keras.utils.set_random_seed(seed)
    return script.build_model()


def built(optimizer, network):
    optimizer.build(network.trainable_variables)
    return optimizer


def gradient_of_update(network, tensors):
    """Return what update_network climbs down: plain descent with rate 1 moves weights by it."""
    before = network.get_weights()
    loss = script.update_network(network, built(keras.optimizers.SGD(1.0), network), *tensors)
    gradient = [old - new for old, new in zip(before, network.get_weights())]
    network.set_weights(before)
    return float(loss), gradient


def score_function_gradient(network, states, actions, returns):
    """Return loss and gradient of -mean(G log p(a|s)), in float64, forward and back by hand."""
    W1, b1, W2, b2, W3, b3 = (weight.astype("float64") for weight in network.get_weights())
    h1 = np.maximum(states @ W1 + b1, 0)
    h2 = np.maximum(h1 @ W2 + b2, 0)
    logits = h2 @ W3 + b3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.mean(returns * np.log(p[np.arange(len(actions)), actions]))
    d3 = returns[:, None] * (p - np.eye(2)[actions]) / len(actions)
    d2 = (d3 @ W3.T) * (h2 > 0)
    d1 = (d2 @ W2.T) * (h1 > 0)
    return loss, [states.T @ d1, d1.sum(0), h1.T @ d2, d2.sum(0), h2.T @ d3, d3.sum(0)]


def distance(gradient, other):
    """Return how far two gradients are apart, relative to the length of the second."""
    flat, other = (np.concatenate([np.ravel(part) for part in g]) for g in (gradient, other))
    return np.linalg.norm(flat - other) / np.linalg.norm(other)


def test_returns_of_the_articles_four_steps():
    # G3 = 4, G2 = 3 + 4/2, G1 = 2 + 3/2 + 4/4, G0 = 1 + 2/2 + 3/4 + 4/8
    assert script.discounted_returns([1, 2, 3, 4], 0.5).tolist() == [3.25, 4.5, 5.0, 4.0]
    assert script.discounted_returns([1, 2, 3, 4], 0).tolist() == [1, 2, 3, 4]
    assert script.discounted_returns([1, 2, 3, 4], 1).tolist() == [10, 9, 7, 4]


def test_standardise_by_hand():
    np.testing.assert_allclose(script.standardise(np.array([1.0, 3.0])), [-1, 1])
    root = np.sqrt(1.5)  # of 0, 1, 2 the variance is 2 / 3
    np.testing.assert_allclose(script.standardise(np.array([0.0, 1.0, 2.0])), [-root, 0, root])


def test_pad_episode():
    states, actions, returns = episode(3)
    padded = script.pad_episode(list(states), list(actions), returns, 5)
    assert [tensor.shape.as_list() for tensor in padded] == [[5, 4], [5], [5], []]
    assert [tensor.dtype for tensor in padded[::2]] == [tf.float32, tf.float32]
    np.testing.assert_array_equal(padded[0][:3], states)
    np.testing.assert_array_equal(padded[1][:3], actions)
    np.testing.assert_allclose(padded[2][:3], returns, rtol=1e-6)
    assert not any(padded[i][3:].numpy().any() for i in range(3))
    assert float(padded[3]) == 3


@pytest.mark.parametrize("length", [1, 7, 200])
def test_difference_1_the_gradient_is_the_score_functions(length):
    network, (states, actions, returns) = new_network(), episode(length)
    loss, gradient = gradient_of_update(network, script.pad_episode(states, actions, returns, 200))
    expected_loss, expected = score_function_gradient(network, states, actions, returns)
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    assert distance(gradient, expected) < 1e-5


def test_difference_1_the_trap_by_hand():
    """The docstring's numbers. Should Keras mend its fused gradient, this test will say so."""
    states, actions = np.ones((5, 4), "float32"), np.array([0, 0, 1, 0, 1])
    returns = np.array([3, 1, 0, -1, -2], "float32")
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(2, activation="softmax", kernel_initializer="zeros")(inputs)
    network = keras.Model(inputs, outputs)
    tensors = script.pad_episode(states, actions, returns, 200)
    loss, (_, right) = gradient_of_update(network, tensors)
    assert loss == pytest.approx(np.mean(returns) * np.log(2))
    np.testing.assert_allclose(right, [-0.5, 0.5], atol=1e-6)
    network.compile(loss="categorical_crossentropy", optimizer=keras.optimizers.SGD(1.0))
    trap_loss = network.train_on_batch(states, returns[:, None] * np.eye(2)[actions])
    trap = -network.get_weights()[1]
    assert float(trap_loss) == pytest.approx(loss)  # nothing looks wrong
    message = "return * one_hot(action) is right in this Keras: tell so in the docstring"
    assert np.abs(trap - right).max() > 1e-3, message
    np.testing.assert_allclose(trap, [-0.1, 0.9], atol=1e-6)


def trapped_update(network, optimizer, states, actions, discounted_rewards, length):
    """What suggests itself: the return in the target, Keras's cross-entropy over it."""
    with tf.GradientTape() as tape:
        targets = discounted_rewards[:, tf.newaxis] * tf.one_hot(actions, 2)
        losses = keras.losses.categorical_crossentropy(targets, network(states))
        real = tf.cast(tf.range(len(losses)) < tf.cast(length, tf.int32), tf.float32)
        loss = tf.reduce_sum(real * losses) / length
    optimizer.apply(tape.gradient(loss, network.trainable_variables))
    return loss


def test_difference_1_a_trapped_agent_does_not_learn(monkeypatch):
    flags = ["--epochs", "200", "--seed", "2"]
    right = script.main(flags)["reward"]
    monkeypatch.setattr(script, "update_network", trapped_update)
    trapped = script.main(flags)["reward"]
    assert trapped < 50  # chance gives 22
    assert right > 2 * trapped


def test_difference_2_equal_returns_teach_nothing():
    assert script.standardise(np.full(3, 7.5)).tolist() == [0, 0, 0]
    network = new_network()
    returns = script.standardise(script.discounted_returns([1.0], 0.95))  # an episode of one step
    tensors = script.pad_episode(np.ones((1, 4), "float32"), [1], returns, 200)
    before = network.get_weights()
    loss = script.update_network(network, built(keras.optimizers.Adam(), network), *tensors)
    assert float(loss) == 0
    for one, other in zip(before, network.get_weights()):
        np.testing.assert_array_equal(one, other)


def test_difference_3_padding_changes_nothing():
    network, (states, actions, returns) = new_network(), episode(30)
    loss, plain = gradient_of_update(network, script.pad_episode(states, actions, returns, 30))
    padded_loss, padded = gradient_of_update(
        network, script.pad_episode(states, actions, returns, 200)
    )
    assert padded_loss == pytest.approx(loss, rel=1e-5)
    assert distance(padded, plain) < 1e-5


def test_differences_3_and_4_nothing_runs_eagerly_or_is_traced_twice(monkeypatch):
    traced, called = [], []
    update_network, call = script.update_network, keras.layers.Dense.call

    def watched_update(*args):
        traced.append(args[2].shape)
        return update_network(*args)

    def watched_call(self, inputs, **options):
        called.append(tf.executing_eagerly() and isinstance(inputs, tf.Tensor))
        return call(self, inputs, **options)

    monkeypatch.setattr(script, "update_network", watched_update)
    monkeypatch.setattr(keras.layers.Dense, "call", watched_call)
    script.main(["--epochs", "20"])
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    rewards = json.loads(path.read_text())["arms"]["reinforce"]["history"]["reward"]
    assert len(set(rewards)) > 5  # episodes of many lengths, and one shape
    assert traced == [(200, 4)]
    assert called
    assert not any(called)


def test_difference_5_runs_have_seeds_and_a_mean():
    final = script.main(["--epochs", "15", "--seed", "3", "--runs", "2"])
    alone = script.main(["--epochs", "15", "--seed", "4"])
    paths = sorted(script.pathlib.Path("log").glob("*/*/results.json"))
    both, single = (json.loads(path.read_text())["arms"]["reinforce"] for path in paths)
    assert [run["seed"] for run in both["runs"]] == [3, 4]
    histories = [run["history"]["reward"] for run in both["runs"]]
    assert [len(rewards) for rewards in histories] == [15, 15]
    assert histories[0] != histories[1] == single["history"]["reward"]
    assert both["history"] == both["runs"][0]["history"]
    for metric in ("reward", "greedy_reward"):
        values = [run["final"][metric] for run in both["runs"]]
        assert values[1] == alone[metric]
        assert final[metric] == pytest.approx(np.mean(values))
        assert both["spread"][metric] == pytest.approx(np.std(values, ddof=1))


def test_difference_5_the_articles_settings_and_an_end():
    args = script.parse_args([])
    assert (args.epochs, args.gamma, args.runs) == (1500, 0.95, 1)
    assert script.make_env().spec.max_episode_steps == 200
    assert new_network().count_params() == 4 * 30 + 30 + 30 * 30 + 30 + 30 * 2 + 2


def test_max_steps_cuts_the_last_episode(capsys):
    script.main(["--epochs", "50", "--max-steps", "100"])
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    rewards = json.loads(path.read_text())["arms"]["reinforce"]["history"]["reward"]
    assert sum(rewards) == 100  # a reward of one a step
    assert 1 < len(rewards) < 50


def test_a_loss_that_is_not_finite(monkeypatch, capsys):
    """It makes the policy nan: the game goes on, and the run ends in one line."""
    sgd = keras.optimizers.SGD
    monkeypatch.setattr(keras.optimizers, "Adam", lambda: sgd(1e38))
    code, line = fails_in_one_line(
        lambda: script.run_as_command(lambda: script.main(["--epochs", "30"])), capsys
    )
    assert (code, "not finite" in line) == (1, True)
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    assert json.loads(path.read_text())["complete"] is False


def test_actions_follow_the_policy():
    network = new_network()
    state = np.array([0.3, -1.0, 0.2, 2.0], "float32")
    policy = script.compile_policy(network)
    probabilities = network(state[None]).numpy()[0]
    np.testing.assert_allclose(policy(tf.constant(state)), probabilities, rtol=1e-5)
    drawn = [script.get_action(policy, state) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(probabilities[1], abs=0.05)  # four standard errors
    network.set_weights([weight * 0 for weight in network.get_weights()])
    np.testing.assert_allclose(policy(tf.constant(state)), [0.5, 0.5])  # sees new weights


def test_weights_move(smoke_run):
    saved = keras.models.load_model(smoke_run("reinforce_cartpole").folder / "reinforce.keras")
    moved = [np.abs(a - b).max() for a, b in zip(saved.get_weights(), new_network(0).get_weights())]
    assert min(moved) > 1e-4


@pytest.mark.slow
def test_claim_rewards_climb_with_high_variance():
    """The article's 1,500 episodes, five seeds: all end near 200, and on the way differ widely."""
    script.main(["--runs", "5"])
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    found = json.loads(path.read_text())["arms"]["reinforce"]["runs"]
    assert min(run["final"]["reward"] for run in found) > 150
    assert np.std([np.mean(run["history"]["reward"][300:500]) for run in found], ddof=1) > 10
