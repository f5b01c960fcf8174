"""double_q_cartpole.py, and what dueling_q_cartpole.py does likewise: learning, memory, games."""

import re
from unittest import mock

import helpers
import keras
import numpy as np
import oracles
import pytest
import tensorflow as tf

import double_q_cartpole as double_q
import dueling_q_cartpole as dueling_q

in_both = pytest.mark.parametrize("script", [double_q, dueling_q], ids=["double_q", "dueling_q"])
BUILDERS = {
    (double_q, "dqn"): double_q.build_model,
    (double_q, "double"): double_q.build_model,
    (dueling_q, "double"): lambda: dueling_q.DQModel(30, 2, dueling=False),
    (dueling_q, "dueling"): lambda: dueling_q.DQModel(30, 2, dueling=True),
}


# --- Double Q, and its parts ---
@pytest.mark.parametrize(("script", "arm"), BUILDERS)
def test_a_step_is_the_articles(script, arm):
    primary, target, theirs = [BUILDERS[script, arm]() for _ in range(3)]
    theirs.set_weights(primary.get_weights())
    judge, tau = (theirs, 0) if arm == "dqn" else (target, 0.08)
    rng, state = np.random.default_rng(0), np.ones((1, 4), "float32")
    states, next_states = rng.normal(size=(2, 32, 4)).astype("float32")
    next_states[0] = 0  # a zero that is no terminal
    terminals = np.arange(32) % 5 == 1
    batch = states, rng.integers(0, 2, 32), rng.normal(1, 1, 32), next_states, terminals
    optimizers = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1)  # as long as the gradient
    expected = oracles.train_as_the_article(theirs, judge, batch, optimizers[0], "mse", 0.95)
    pairs = zip(target.get_weights(), theirs.get_weights())
    followed = [t * (1 - tau) + e * tau for t, e in pairs]

    optimizers[1].build(primary.trainable_variables)
    rows = np.column_stack(batch).astype("float32")
    loss, q = script.train(primary, target if tau else None, optimizers[1], rows, state)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    oracles.assert_same(primary.get_weights(), theirs.get_weights(), atol=1e-6)
    oracles.assert_same(target.get_weights(), followed, atol=1e-6)
    np.testing.assert_allclose(q, theirs(state), rtol=1e-4)  # of the state at hand, afterwards


def test_network_is_the_articles():
    network, hidden = oracles.layers_as_text(double_q.build_model()), "Dense 30 relu HeNormal"
    assert network == ["InputLayer", hidden, hidden, "Dense 2 linear"]


@in_both
@pytest.mark.parametrize("count", [1, 6, 7, 8, 15, 100])
def test_memory_holds_the_newest_and_draws_each_once(script, count):
    memory = script.Memory(7)
    for i in range(count):
        memory.add_sample(np.full(4, i), i % 2, i + 0.5, np.full(4, i + 1), i % 3 == 0)
    i = np.arange(max(0, count - 7), count)
    columns = [i] * 4 + [i % 2, i + 0.5] + [i + 1] * 4 + [i % 3 == 0]
    rows = memory.sample(len(i)).numpy()
    np.testing.assert_array_equal(rows[rows[:, 0].argsort()], np.column_stack(columns))


@in_both
def test_choose_action(script):
    actions = [script.choose_action(np.array([[2, 3]]), 0.2) for _ in range(5000)]
    assert set(actions) == {0, 1}
    assert np.mean(actions) == pytest.approx(1 - 0.2 / 2, abs=0.02)


@pytest.mark.parametrize(
    ("show", "expected"),  # 3.52 by integration, 3.19 by Clark's formula
    [
        (double_q.show_max_bias, "1 1 3.52"),
        (dueling_q.show_dueling_example, "10 50 100 53.33 -43.33 -3.33 46.67 100 2 1 3.19"),
    ],
)
def test_examples_by_hand(show, expected, capsys):
    show()
    found = re.findall(r"-?\d+(?:\.\d+)?", capsys.readouterr().out)
    np.testing.assert_allclose(np.double(found), np.double(expected.split()), atol=0.12)


def test_overestimation_by_hand():
    def overestimation(*largest):
        return double_q.overestimation(lambda states: states, np.outer(largest, [-1, 1]))

    returns = [1 + 0.95 + 0.95**2, 1 + 0.95, 1]
    np.testing.assert_allclose(overestimation(5, 3, 1), np.subtract([5, 3, 1], returns))
    assert len(overestimation(*[25] * 199)) == 199
    returns = [sum(0.95**i for i in range(200 - t)) for t in range(110)]  # 90 are left out
    np.testing.assert_allclose(overestimation(*[25] * 200), 25 - np.array(returns))


# --- Trainings: a scripted one, and two short ones of each arm ---
@in_both
@pytest.mark.parametrize(("falls", "std"), [(True, 3), (False, 0)])
def test_what_a_training_stores_and_records(script, falls, std, monkeypatch):
    """The 96th step is the first that trains: double_q_cartpole.py then has three batches."""
    env, losses = oracles.Scripted(94, 3, 30, falls=falls), tf.Variable(0.0)
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, use_bias=False)])
    network.set_weights([np.outer([0, 0, 0, 1], [0, 1])])  # in state s the Q values are 0 and s

    def train(primary_network, target_network, optimizer, batch, state):
        return losses.assign_add(1.0), network(state)

    memory, choose_action = script.Memory(200), mock.Mock(wraps=script.choose_action)
    changed = {"train": train, "choose_action": choose_action, "DELAY_TRAINING": 95}
    changed |= {"build_model": lambda: network, "DQModel": lambda *_, dueling: network}
    changed |= {"Memory": mock.Mock(return_value=memory), "EPSILON_MIN_ITER": 20}
    for name, value in changed.items():
        monkeypatch.setattr(script, name, value, raising=False)
    monkeypatch.setattr(script.gymnasium, "make", make := mock.Mock(return_value=env))
    flags = ["--arms", "double", "--epochs", "3", "--random-reward-std", str(std)]
    _, arms = helpers.run_main(script, flags)
    make.assert_called_with("CartPole-v1", max_episode_steps=200, render_mode="rgb_array")
    script.Memory.assert_called_with(50000 if script == double_q else 500000)
    (record,) = arms["double"]["runs"]
    assert record["history"] == {"reward": [94, 3, 30], "avg loss": [0.0, 1.5, 17.5]}
    assert record["final"]["reward"] == pytest.approx((94 + 3 + 30) / 3)
    assert record["final"]["episodes_to_180"] is None
    states, rows = [*range(1, 95), *range(96, 99), *range(100, 130)], memory.rows[:127]
    assert (memory.added, rows[:, 3].tolist()) == (127, states)
    assert rows[:, 4].tolist() == env.actions[:127]
    assert [rows[:, 5].mean(), rows[:, 5].std()] == pytest.approx([1, std], abs=0.2 * std)
    assert rows[:, 9].tolist() == [state + 1 for state in states]
    ends = [93, 96, 126] if falls else []  # not the time limit
    assert np.flatnonzero(rows[:, 10]).tolist() == ends
    q_values, epsilons = zip(*[call.args for call in choose_action.mock_calls])
    random_steps = 96 if script == dueling_q else 0
    assert [q[0][1] for q in q_values][random_steps:] == states[random_steps:]  # no older state's
    steps = np.arange(127)
    expected = 0.01 + 0.99 * np.exp(-0.0005 * steps)
    if script == dueling_q:  # its difference 6: without a jump
        expected = np.interp(steps, [95, 95 + 20], [1, 0.01])
    np.testing.assert_allclose(epsilons, expected)


@in_both
def test_final_numbers_by_hand(script):
    env, rewards = oracles.Scripted(*range(190, 200)), [180] * 5 + [200] * 20 + [100]
    before = [np.zeros_like] if script == double_q else []  # the network
    final = script.evaluate(*before, lambda state: np.array([[0, 5]]), env, rewards)
    expected = {"reward": (19 * 200 + 100) / 20, "reached_180": True, "episodes_to_180": 6}
    expected["greedy_reward"] = 194.5
    if script == double_q:  # the values are 0, where n steps follow
        returns = [(1 - 0.95**n) / 0.05 for length in range(190, 200) for n in range(1, length + 1)]
        expected["overestimation"] = pytest.approx(-np.mean(returns))
    assert final == expected
    assert env.actions == [1] * 1945  # ten episodes, always the action with the largest Q


@in_both
def test_two_trainings_of_each_arm_and_each_arm_alone(script, monkeypatch):
    monkeypatch.setattr(script, "DELAY_TRAINING", 90, raising=False)
    monkeypatch.setattr(script, "TAU", 0)  # the target networks stay as they start
    monkeypatch.setattr(script, "train", train := mock.Mock(wraps=script.train))
    monkeypatch.setattr(script, "evaluate", evaluate := mock.Mock(wraps=script.evaluate))
    folder, beside = helpers.run_main(script, ["--epochs", "8", "--runs", "2"])
    calls = zip(train.mock_calls, evaluate.mock_calls)
    for arm, seed in [(arm, seed) for arm in beside for seed in (0, 1)]:
        trained, judged = next(calls)
        primary, target, optimizer, *_ = trained.args
        *evaluated, predict, _, _ = judged.args
        keras.utils.set_random_seed(seed)
        first = BUILDERS[script, arm]().get_weights()
        assert oracles.smallest_move(primary.get_weights(), first) > 0.005  # beside a still target
        assert (target is None) == (arm == "dqn")
        if target is not None:
            oracles.assert_same(target.get_weights(), first)  # a copy
        oracles.check_adam(optimizer)
        assert evaluated == ([primary] if script == double_q else [])
        np.testing.assert_allclose(predict(tf.eye(4)), primary(tf.eye(4)), rtol=1e-4)
        if seed == 0:
            saved = keras.models.load_model(folder / f"{arm}.keras")
            oracles.assert_same(saved.get_weights(), primary.get_weights())
            assert saved.optimizer.iterations == optimizer.iterations > 0  # compiled
    for arm in beside:
        _, alone = helpers.run_main(script, ["--epochs", "8", "--seed", "1", "--arms", arm])
        (found,), (_, expected) = alone[arm]["runs"], beside[arm]["runs"]
        assert (found["history"], found["final"]) == (expected["history"], expected["final"])
