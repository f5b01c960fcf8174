"""double_q_cartpole.py: Double Q by hand and in NumPy, and its differences from the article."""

import math

import numpy as np
import oracles
import pytest
import tensorflow as tf
from oracles import Scripted, random_batch, train_scripted

import double_q_cartpole as script

keras = script.keras


# --- Double Q ---
def new_networks():
    """Return two networks with different weights."""
    keras.utils.set_random_seed(1)
    return script.build_model(), script.build_model()


@pytest.mark.parametrize("arm", script.ARMS)
def test_a_training_step_equals_numpy(arm):
    batch, (primary, target) = random_batch(), new_networks()
    states, _, _, next_states, _ = batch
    chooser, judge = (target if arm == "dqn_target" else primary), (primary, target)[arm != "dqn"]
    q_chooser, q_judge = (
        oracles.mlp(next_states, network.get_weights())[-1] for network in (chooser, judge)
    )
    outputs = oracles.mlp(states, primary.get_weights())
    q = outputs[-1]
    target_q = oracles.target_q(batch, q, q_chooser, q_judge)
    dq = 2 * (q - target_q) / q.size

    args = None if arm == "dqn" else target, 0.95, arm == "double"
    (loss, mean_q), gradient = oracles.gradient_of(
        primary, lambda sgd: script.train(batch, primary, args[0], sgd, *args[1:])
    )
    assert float(loss) == pytest.approx(np.mean((q - target_q) ** 2), rel=1e-5)
    assert float(mean_q) == pytest.approx(np.mean(np.max(q_judge, axis=1)), rel=1e-5)
    expected = oracles.mlp_gradients(outputs, primary.get_weights(), dq)
    oracles.assert_same(gradient, expected, atol=1e-5)


def test_soft_update_equals_the_articles_formula():
    primary, target = new_networks()
    pairs = list(zip(target.get_weights(), primary.get_weights()))
    script.update_network(primary, target, 0.08)
    oracles.assert_same(target.get_weights(), [t * (1 - 0.08) + e * 0.08 for t, e in pairs], 1e-7)
    oracles.assert_same(primary.get_weights(), [e for _, e in pairs])


@pytest.mark.parametrize("arm", script.ARMS)
def test_difference_5_the_compiled_agent_trains_and_follows(arm):
    networks, copies = list(new_networks()), list(new_networks())
    if arm == "dqn":
        networks[1] = copies[1] = None
    double_q = [arm == "double"]
    oracles.check_compiled_agent(script, networks, copies, double_q, double_q)


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
    batch = script.split_rows(memory.sample(len(i)))  # each once
    states, actions, rewards, next_states, terminals = (column.numpy() for column in batch)
    order = states[:, 0].argsort()
    np.testing.assert_array_equal(states[order], np.repeat(i[:, None], 4, axis=1))
    np.testing.assert_array_equal(actions[order], i % 2)
    np.testing.assert_array_equal(rewards[order], i + 0.5)
    np.testing.assert_array_equal(next_states[order], np.repeat(i[:, None] + 1, 4, axis=1))
    np.testing.assert_array_equal(terminals[order], i % 3 == 0)
    drawn = [int(memory.sample(1)[0, 0]) for _ in range(60 * len(i))]
    assert np.bincount(np.array(drawn) - i[0], minlength=len(i)).min() > 30


# --- Training ---
def test_difference_5_all_networks_start_alike_and_all_move(monkeypatch):
    flags = ["--epochs", "25", "--epsilon-decay", "0.01"]
    agents = oracles.watch_networks(script, monkeypatch, flags)
    assert [len(networks) for networks, _ in agents] == [1, 2]  # dqn, double
    networks, starts = (sum(column, []) for column in zip(*agents))
    for network, start in zip(networks, starts):
        oracles.assert_same(start, starts[0])
        assert oracles.smallest_move(network.get_weights(), start) > 1e-3
    _, primary, target = (network.get_weights() for network in networks)
    assert any((one != other).any() for one, other in zip(primary, target))


@pytest.mark.parametrize(("falls", "flags", "terminals"), oracles.ENDINGS)
def test_difference_1_only_a_fall_is_a_terminal(monkeypatch, falls, flags, terminals):
    memory = oracles.check_memory(script, monkeypatch, falls, flags, terminals)
    assert memory.max_memory == 50000


def test_rewards_are_noisy(monkeypatch):
    flags = ["--epochs", "1", "--random-reward-std", "3"]
    _, memory = train_scripted(script, monkeypatch, Scripted(2000), *flags)
    rewards = memory.rewards[: memory.added]
    assert [rewards.mean(), rewards.std()] == pytest.approx([1, 3], abs=0.2)


def test_difference_4_lengths_and_means_over_the_steps_that_trained(monkeypatch):
    oracles.check_means(script, monkeypatch, 96)


@pytest.mark.parametrize("level", [0.9999, 0.5, 0.0101])
def test_epsilon_falls_as_in_the_article(monkeypatch, level):
    at_random = oracles.random_actions(script, monkeypatch, level, 1000, "--epsilon-decay", "0.01")
    eps = [0.01 + 0.99 * math.exp(-0.01 * step) for step in range(1000)]
    assert at_random == [level < value for value in eps]


def test_final_numbers_by_hand(monkeypatch):
    # Of the last 20 lengths two may be 10: 18 * 200 + 2 * 10 = 20 * 181
    env = Scripted(*[10] * 5, *[200] * 20)
    final = train_scripted(script, monkeypatch, env, "--epochs", "25")[0]["final"]
    assert final["episodes_to_180"] == 5 + 18
    assert final["reward"] == 200
    assert final["greedy_reward"] == 3
    returns = 1 + 0.95 + 0.95**2, 1 + 0.95, 1
    assert final["overestimation"] == pytest.approx(5 - sum(returns) / 3)
    record, _ = train_scripted(script, monkeypatch, Scripted(), "--epochs", "2")
    assert record["final"]["episodes_to_180"] == 3  # one more than it had: never
