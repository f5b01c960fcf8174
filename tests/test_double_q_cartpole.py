"""double_q_cartpole.py: Double Q by hand and in NumPy, and its differences from the article."""

import json
import math
import pathlib
import types

import numpy as np
import pytest
import tensorflow as tf

import double_q_cartpole as script

keras = script.keras


class Scripted:
    """An environment with episodes of the given lengths, then of 3 steps; it notes the actions."""

    def __init__(self, *lengths, falls=True):
        self.lengths, self.falls, self.left, self.actions = iter(lengths), falls, 0, []

    def reset(self, seed=None):
        self.left = next(self.lengths, 3)
        return np.zeros(4, "float32"), {}

    def step(self, action):
        self.actions.append(action)
        self.left -= 1
        ended = self.left == 0
        return np.ones(4, "float32"), 1.0, ended and self.falls, ended and not self.falls, {}


def train_scripted(script, monkeypatch, env, *flags):
    """Train in `env` an agent without a network; return its record and its memory.

    Its Q values are 0 and 5. Its losses are 1, 2, 3, ..., its mean Q values ten times as large.
    """
    memories, losses = [], iter(range(1, 10000))

    class Memory(script.Memory):
        def __init__(self, max_memory):
            super().__init__(max_memory)
            memories.append(self)

    def learn(*batch):
        loss = next(losses)
        return loss, 10 * loss

    def compile_agent(*args):
        return learn, lambda states: tf.constant([[0.0, 5.0]])

    monkeypatch.setattr(script.gymnasium, "make", lambda *args, **options: env)
    monkeypatch.setattr(script, "Memory", Memory)
    monkeypatch.setattr(script, "compile_agent", compile_agent)
    script.main(["--arms", "double", *flags])
    (path,) = pathlib.Path("log").glob("*/*/results.json")
    return json.loads(path.read_text())["arms"]["double"], memories[0]


# --- Double Q ---


def random_batch(seed=0):
    """Return states, actions, rewards, next states and terminals of 32 steps.

    The first one's next state is zero and no terminal; the second is a terminal, and not zero.
    """
    rng = np.random.default_rng(seed)
    states, next_states = rng.normal(size=(2, 32, 4)).astype("float32")
    actions, rewards = rng.integers(0, 2, 32, "int32"), rng.normal(1, 1, 32).astype("float32")
    terminals = (rng.uniform(size=32) < 0.2).astype("float32")
    next_states[0], terminals[:2] = 0, [0, 1]
    return states, actions, rewards, next_states, terminals


def step_of_descent(train, batch, primary, *args):
    """Return what `train` returns, and the gradient: by it plain descent moves the weights."""
    sgd, before = keras.optimizers.SGD(1.0), primary.get_weights()
    sgd.build(primary.trainable_variables)
    loss, mean_q = train(batch, primary, args[0], sgd, *args[1:])
    moves = [old - new for old, new in zip(before, primary.get_weights())]
    primary.set_weights(before)
    return float(loss), float(mean_q), moves


def new_networks():
    """Return two networks with different weights."""
    keras.utils.set_random_seed(1)
    return script.build_model(), script.build_model()


@pytest.mark.parametrize(
    ("reward", "terminal", "primary_q", "target_q", "dqn", "double", "dqn_target"),
    [
        (1, 0, [4, 2], [8, 6], 3, 5, 5),  # the judge agrees
        (1, 0, [4, 2], [6, 8], 3, 4, 5),  # it does not
        (2, 0, [0, 6], [4, 2], 5, 3, 4),  # nor here
        (1, 1, [4, 2], [8, 6], 1, 1, 1),  # a fallen pole
    ],
)
def test_targets_by_hand(reward, terminal, primary_q, target_q, dqn, double, dqn_target):
    def network(q):  # Q values of 0, and of `q` in the state (1, 0, 0, 0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, use_bias=False)])
        model.set_weights([np.array([q, [0, 0], [0, 0], [0, 0]])])
        return model

    batch = [np.zeros((1, 4)), [1], [reward], np.eye(1, 4), [terminal]]
    batch = [tf.constant(v, "int32" if i == 1 else "float32") for i, v in enumerate(batch)]
    primary, target = network(primary_q), network(target_q)
    for args, expected in (
        ((None, 0.5, False), dqn),
        ((target, 0.5, True), double),
        ((target, 0.5, False), dqn_target),
    ):
        loss, mean_q, _ = step_of_descent(script.train, batch, primary, *args)
        assert loss == pytest.approx(expected**2 / 2)  # the action that was not taken adds none
        assert mean_q == max(primary_q if args[0] is None else target_q)


def numpy_forward(x, network):
    """Return the outputs of the layers of 4-30-30-2 for states (batch, 4): two hidden ones, Q."""
    W1, b1, W2, b2, W3, b3 = (weight.astype("float64") for weight in network.get_weights())
    h1 = np.maximum(x @ W1 + b1, 0)
    h2 = np.maximum(h1 @ W2 + b2, 0)
    return h1, h2, h2 @ W3 + b3


@pytest.mark.parametrize("arm", script.ARMS)
def test_a_training_step_equals_numpy(arm):
    batch, (primary, target) = random_batch(), new_networks()
    states, actions, rewards, next_states, terminals = batch
    q_chooser = numpy_forward(next_states, target if arm == "dqn_target" else primary)[2]
    q_judge = numpy_forward(next_states, primary if arm == "dqn" else target)[2]
    h1, h2, q = numpy_forward(states, primary)
    target_q = q.copy()  # as the article: in each row the entry of the action taken is changed
    for i in range(32):
        future = 0 if terminals[i] else 0.95 * q_judge[i, q_chooser[i].argmax()]
        target_q[i, actions[i]] = rewards[i] + future
    dq = 2 * (q - target_q) / q.size
    weights = primary.get_weights()
    dh2 = (dq @ weights[4].T) * (h2 > 0)
    dh1 = (dh2 @ weights[2].T) * (h1 > 0)
    gradients = [states.T @ dh1, dh1.sum(0), h1.T @ dh2, dh2.sum(0), h2.T @ dq, dq.sum(0)]

    args = None if arm == "dqn" else target, 0.95, arm == "double"
    loss, mean_q, moves = step_of_descent(script.train, batch, primary, *args)
    assert loss == pytest.approx(np.mean((q - target_q) ** 2), rel=1e-5)
    assert mean_q == pytest.approx(np.mean(np.max(q_judge, axis=1)), rel=1e-5)
    for move, gradient in zip(moves, gradients, strict=True):
        np.testing.assert_allclose(move, gradient, atol=1e-5)


def test_soft_update_equals_the_articles_formula():
    primary, target = new_networks()
    pairs = list(zip(target.get_weights(), primary.get_weights()))
    script.update_network(primary, target, 0.08)
    for weight, primary_weight, (t, e) in zip(target.get_weights(), primary.get_weights(), pairs):
        np.testing.assert_allclose(weight, t * (1 - 0.08) + e * 0.08, atol=1e-7)
        np.testing.assert_array_equal(primary_weight, e)


@pytest.mark.parametrize("arm", script.ARMS)
def test_difference_5_the_compiled_agent_trains_and_follows(arm):
    """It does what `train` and `update_network` do uncompiled, with the article's Adam."""
    (primary, target), (primary_copy, target_copy) = new_networks(), new_networks()
    if arm == "dqn":
        target = target_copy = None
    args = types.SimpleNamespace(gamma=0.95, tau=0.08)
    learn, q_values = script.compile_agent(arm, primary, target, args)
    adam = keras.optimizers.Adam(0.001)
    adam.build(primary_copy.trainable_variables)
    for step in range(3):
        batch = random_batch(step)
        results = learn(*map(tf.constant, batch))
        expected = script.train(batch, primary_copy, target_copy, adam, 0.95, arm == "double")
        np.testing.assert_allclose(results, expected, rtol=1e-4)
        if target:
            script.update_network(primary_copy, target_copy, 0.08)
            for one, two in zip(target.get_weights(), target_copy.get_weights()):
                np.testing.assert_allclose(one, two, atol=1e-5)
    states = batch[0][:1]
    np.testing.assert_allclose(q_values(tf.constant(states)), primary_copy(states), atol=1e-4)


def test_network_is_the_articles():
    keras.utils.set_random_seed(0)
    shapes = [weight.shape for weight in script.build_model().get_weights()]
    assert shapes == [(4, 30), (30,), (30, 30), (30,), (30, 2), (2,)]
    hidden = np.concatenate([script.build_model().get_weights()[2].ravel() for _ in range(20)])
    assert np.std(hidden) == pytest.approx(math.sqrt(2 / 30), rel=0.02)  # He: sqrt(2 / inputs)


def test_choose_action():
    def q_values(states):
        assert (states.shape, states.dtype) == ((1, 4), tf.float32)
        return tf.constant([[2.0, 3.0]])

    keras.utils.set_random_seed(0)
    for eps, share in ((0, 1.0), (1, 0.5), (0.5, 0.75)):
        actions = [script.choose_action(np.zeros(4, "float32"), q_values, eps) for _ in range(2000)]
        assert set(actions) <= {0, 1}
        assert np.mean(actions) == pytest.approx(share, abs=0.04)


def test_max_bias_is_the_integrals(tmp_path, capsys):
    script.show_max_bias(0, tmp_path)
    means = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    below = [0.5 * (1 + math.erf((t - 1) / 4 / math.sqrt(2))) for t in np.arange(0.005, 40, 0.01)]
    maximum = sum(1 - p**2 for p in below) * 0.01  # of a variable that is never negative
    judged = 1 - below[0] ** 2  # 1, unless the largest is the 0 of A
    assert means == pytest.approx([1, 1, maximum, judged], abs=0.12)
    assert maximum > 3


def test_overestimation_by_hand():
    # The returns are 1 + 0.5 + 0.25, then 1 + 0.5, then 1.
    assert script.overestimation([3.0, 2.0, 0.5], 0.5).tolist() == [1.25, 0.5, -0.5]
    # The end of an episode cut off at 200 steps is left out.
    returns = [sum(0.95**i for i in range(200 - t)) for t in range(110)]
    np.testing.assert_allclose(script.overestimation([25.0] * 200, 0.95), 25 - np.array(returns))


@pytest.mark.parametrize("count", [1, 6, 7, 8, 15, 100])
def test_difference_3_memory_holds_the_newest_and_can_draw_each(count):
    keras.utils.set_random_seed(0)
    memory = script.Memory(7)
    for i in range(count):
        memory.add_sample(np.full(4, i), i % 2, i + 0.5, np.full(4, i + 1), i % 3 == 0)
    i = np.arange(max(0, count - 7), count)
    batch = memory.sample(len(i))  # each once
    states, actions, rewards, next_states, terminals = (column.numpy() for column in batch)
    order = states[:, 0].argsort()
    np.testing.assert_array_equal(states[order], np.repeat(i[:, None], 4, axis=1))
    np.testing.assert_array_equal(actions[order], i % 2)
    np.testing.assert_array_equal(rewards[order], i + 0.5)
    np.testing.assert_array_equal(next_states[order], np.repeat(i[:, None] + 1, 4, axis=1))
    np.testing.assert_array_equal(terminals[order], i % 3 == 0)
    drawn = [int(memory.sample(1)[0][0, 0]) for _ in range(60 * len(i))]
    assert np.bincount(np.array(drawn) - i[0], minlength=len(i)).min() > 30


# --- Training ---


def test_a_real_training(monkeypatch):
    agents, compile_agent = [], script.compile_agent

    def watched(arm, primary, target, args):
        start = primary.get_weights()
        agents.append((primary, target, start, target.get_weights() if target else start))
        return compile_agent(arm, primary, target, args)

    memories, memory = [], script.Memory
    monkeypatch.setattr(script, "compile_agent", watched)
    monkeypatch.setattr(
        script, "Memory", lambda size: memories.append(memory(size)) or memories[-1]
    )
    script.main(["--epochs", "25", "--epsilon-decay", "0.01"])
    (path,) = pathlib.Path("log").glob("*/*/results.json")
    arms = json.loads(path.read_text())["arms"]
    memories = [memory for memory in memories if memory.max_memory == 50000]
    for memory, record in zip(memories, arms.values(), strict=True):
        lengths = record["history"]["reward"]
        assert memory.added == sum(lengths)
        # Difference 1: a fallen pole is a terminal. Any other step leads to the next one.
        assert max(lengths) < 200
        assert np.flatnonzero(memory.terminals).tolist() == (np.cumsum(lengths) - 1).tolist()
        stands = np.flatnonzero(memory.terminals[: memory.added] == 0)
        np.testing.assert_array_equal(memory.next_states[stands], memory.states[stands + 1])
        assert set(memory.actions[: memory.added]) == {0, 1}
        rewards = memory.rewards[: memory.added]
        assert [rewards.mean(), rewards.std()] == pytest.approx([1, 1], abs=0.2)
    # Difference 5: all networks start from the same weights. Then all of them move.
    (dqn, no_target, start, _), (primary, target, *double_starts) = agents
    assert no_target is None
    for weights in double_starts:
        for one, two in zip(weights, start, strict=True):
            np.testing.assert_array_equal(one, two)
    for network in (dqn, primary, target):
        assert min(np.abs(a - b).max() for a, b in zip(network.get_weights(), start)) > 1e-3
    assert any((a != b).any() for a, b in zip(primary.get_weights(), target.get_weights()))


def test_difference_1_the_time_limit_is_no_terminal(monkeypatch):
    env = Scripted(5, 4, 6, falls=False)
    _, memory = train_scripted(script, monkeypatch, env, "--epochs", "3")
    assert memory.added == 15
    assert not memory.terminals.any()


def test_max_steps_cut_the_last_episode_which_is_no_fall(monkeypatch):
    record, memory = train_scripted(script, monkeypatch, Scripted(5, 4, 6), "--max-steps", "12")
    assert record["history"]["reward"] == [5, 4, 3]
    assert np.flatnonzero(memory.terminals).tolist() == [4, 8]


def test_difference_4_lengths_and_means_over_the_steps_that_trained(monkeypatch):
    # The 96th step is the first that trains.
    record, _ = train_scripted(script, monkeypatch, Scripted(90, 5, 4, 2), "--epochs", "4")
    assert record["history"] == {
        "reward": [90, 5, 4, 2],
        "avg loss": [None, None, (1 + 2 + 3 + 4) / 4, (5 + 6) / 2],
        "mean q": [None, None, (10 + 20 + 30 + 40) / 4, (50 + 60) / 2],
    }


@pytest.mark.parametrize("level", [0.9999, 0.5, 0.0101])
def test_epsilon_falls_as_in_the_article(monkeypatch, level):
    env = Scripted(1000)
    monkeypatch.setattr(script.random, "random", lambda: level)  # random while epsilon is above it
    monkeypatch.setattr(script.random, "randrange", lambda actions: -1)
    train_scripted(script, monkeypatch, env, "--epochs", "1", "--epsilon-decay", "0.01")
    eps = [0.01 + 0.99 * math.exp(-0.01 * step) for step in range(1000)]
    assert env.actions[:1000] == [-1 if level < value else 1 for value in eps]


def test_final_numbers_by_hand(monkeypatch):
    # Of the last 20 lengths two may be 10: 18 * 200 + 2 * 10 = 20 * 181
    env = Scripted(*[10] * 5, *[200] * 20)
    final = train_scripted(script, monkeypatch, env, "--epochs", "25")[0]["final"]
    assert final["episodes_to_180"] == 5 + 18
    assert final["reward"] == 200
    assert final["greedy_reward"] == 3
    returns = 1 + 0.95 + 0.95**2, 1 + 0.95, 1
    assert final["overestimation"] == pytest.approx(5 - sum(returns) / 3)


def test_episodes_to_180_where_it_is_never_reached(monkeypatch):
    record, _ = train_scripted(script, monkeypatch, Scripted(), "--epochs", "2")
    assert record["final"]["episodes_to_180"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("std", ["0", "1"])
def test_claim_both_reach_180(std):
    """Within 300 episodes, in three runs out of three: the mean of 20 episodes passes 180."""
    script.main(["--random-reward-std", std, "--epochs", "300", "--runs", "3"])
    (path,) = pathlib.Path("log").glob("*/*/results.json")
    for record in json.loads(path.read_text())["arms"].values():
        assert max(run["final"]["episodes_to_180"] for run in record["runs"]) <= 300
