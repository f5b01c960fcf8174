"""double_q_cartpole.py, and what dueling_q_cartpole.py does likewise: learning, memory, games."""

import functools
import math

import gymnasium
import helpers
import keras
import numpy as np
import oracles
import pytest

import double_q_cartpole as double_q
import dueling_q_cartpole as dueling_q

in_both = pytest.mark.parametrize("script", [double_q, dueling_q], ids=["double_q", "dueling_q"])


# --- Double Q, and its parts ---
@pytest.mark.parametrize("arm", ["dqn", "double", "dueling"])
def test_a_step_is_the_articles(arm):
    keras.utils.set_random_seed(3)
    dueling = functools.partial(dueling_q.DQModel, 30, 2, dueling=True)
    script, build = (dueling_q, dueling) if arm == "dueling" else (double_q, double_q.build_model)
    primary, target, theirs = build(), build(), build()
    theirs.set_weights(primary.get_weights())
    judge, tau = (theirs, 0) if arm == "dqn" else (target, 0.08)
    batch, state = oracles.random_batch(), np.ones((1, 4), "float32")
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
    layers = [layer[1:] for layer in oracles.dense_layers(double_q.build_model())]
    assert layers == [*[(30, "relu", "HeNormal")] * 2, (2, "linear", "GlorotUniform")]


@in_both
@pytest.mark.parametrize("count", [1, 6, 7, 8, 15, 100])
def test_memory_holds_the_newest_and_can_draw_each(script, count):
    keras.utils.set_random_seed(0)
    memory = script.Memory(7)
    for i in range(count):
        memory.add_sample(np.full(4, i), i % 2, i + 0.5, np.full(4, i + 1), i % 3 == 0)
    i = np.arange(max(0, count - 7), count)
    columns = [i] * 4 + [i % 2, i + 0.5] + [i + 1] * 4 + [i % 3 == 0]
    rows = memory.sample(len(i)).numpy()  # each once
    np.testing.assert_array_equal(rows[rows[:, 0].argsort()], np.column_stack(columns))
    drawn = [int(memory.sample(1)[0, 0]) for _ in range(60 * len(i))]
    assert np.bincount(np.array(drawn) - i[0], minlength=len(i)).min() > 30


@in_both
@pytest.mark.parametrize(("eps", "share"), [(0, 1.0), (1, 0.5), (0.5, 0.75)])
def test_choose_action(script, eps, share):
    keras.utils.set_random_seed(0)
    actions = [script.choose_action(np.array([[2, 3]]), eps) for _ in range(2000)]
    assert set(actions) <= {0, 1}
    assert np.mean(actions) == pytest.approx(share, abs=0.04)


# --- Overestimation, in double_q_cartpole.py only ---
def test_max_bias(capsys):
    keras.utils.set_random_seed(0)
    double_q.show_max_bias()
    means = [float(word.strip(",")) for word in capsys.readouterr().out.split() if "." in word]
    assert means == pytest.approx([1, 1, 3.52], abs=0.12)  # by integration


def test_overestimation_by_hand():
    def overestimation(*largest):
        return double_q.overestimation(lambda states: states, np.outer(largest, [-1, 1]))

    returns = [1 + 0.95 + 0.95**2, 1 + 0.95, 1]
    np.testing.assert_allclose(overestimation(5, 3, 1), np.subtract([5, 3, 1], returns))
    assert len(overestimation(*[25] * 199)) == 199
    returns = [sum(0.95**i for i in range(200 - t)) for t in range(110)]  # 90 are left out
    np.testing.assert_allclose(overestimation(*[25] * 200), 25 - np.array(returns))


# --- Trainings: scripted ones, and two short ones of each arm ---
@in_both
@pytest.mark.parametrize(("falls", "std"), [(True, 3), (False, 0)])
def test_what_a_training_stores_and_records(script, falls, std, monkeypatch):
    """The 96th step is the first that trains: double_q_cartpole.py then has three batches."""
    flags = ["--arms", "double", "--epochs", "2", "--random-reward-std", str(std)]
    monkeypatch.setattr(script, "DELAY_TRAINING", 95, raising=False)  # double_q has none
    env = oracles.Scripted(94, 3, falls=falls)
    _, arms, (training,) = oracles.watch_trainings(script, monkeypatch, flags, env)
    (record,), memory, rows = arms["double"]["runs"], training.memory, training.memory.rows[:97]
    assert record["history"] == {"reward": [94, 3], "avg loss": [0.0, (1 + 2) / 2]}
    assert record["final"]["reward"] == (94 + 3) / 2
    assert (memory.added, len(memory.rows)) == (97, 50000 if script == double_q else 500000)
    states = [*range(1, 95), *range(96, 99)]
    assert rows[:, 3].tolist() == states == [q for q, _ in training.choices]  # no older state's q
    assert rows[:, 9].tolist() == [state + 1 for state in states]
    assert rows[:, 4].tolist() == env.actions[:97]
    assert np.flatnonzero(rows[:, 10]).tolist() == ([93, 96] if falls else [])  # not the time limit
    assert [rows[:, 5].mean(), rows[:, 5].std()] == pytest.approx([1, std], abs=0.2 * std)
    epsilons = {
        double_q: [0.01 + 0.99 * math.exp(-0.0005 * step) for step in range(97)],
        dueling_q: [1.0] * 96 + [1 - 0.99 / 5000],
    }
    np.testing.assert_allclose([eps for _, eps in training.choices], epsilons[script])


@in_both
@pytest.mark.parametrize(  # 2 * 10 + 18 * 200 = 20 * 181
    ("rewards", "mean", "first"),
    [([10] * 5 + [200] * 20 + [100], 195, 23), ([180] * 30, 180, None)],
)
def test_final_numbers_by_hand(script, rewards, mean, first):
    env = oracles.Scripted(*range(190, 200))
    before = [np.zeros_like] if script == double_q else []  # the network
    final = script.evaluate(*before, lambda state: np.array([[0, 5]]), env, rewards)
    found = final["reward"], final["reached_180"], final["episodes_to_180"]
    assert found == (mean, first is not None, first)
    assert final["greedy_reward"] == 194.5
    assert env.actions == [1] * 1945  # ten episodes, always the action with the largest Q


@in_both
def test_two_trainings_of_each_arm(script, monkeypatch):
    monkeypatch.setattr(script, "DELAY_TRAINING", 90, raising=False)
    flags = ["--epochs", "8"]
    folder, arms, trainings = oracles.watch_trainings(script, monkeypatch, [*flags, "--runs", "2"])
    starts = [training.starts[0] for training in trainings]
    assert oracles.smallest_move(starts[0][::2], starts[1][::2]) > 0.1  # seeds 0 and 1: kernels
    oracles.assert_same(starts[0][:4], starts[2][:4])  # both arms: the layers that they share
    for arm, (training, other) in zip(arms, (trainings[:2], trainings[2:])):
        for network, start in zip(training.networks, training.starts):
            oracles.assert_same(start, training.starts[0])  # the target network is a copy
            assert oracles.smallest_move(network.get_weights(), start) > 0.01
        assert len(training.networks) == (1 if arm == "dqn" else 2)
        optimizer, adam = training.optimizer.get_config(), keras.optimizers.Adam().get_config()
        assert optimizer | {"name": ""} == adam | {"name": ""}
        saved = keras.models.load_model(folder / f"{arm}.keras")  # of the first seed
        oracles.assert_same(saved.get_weights(), training.networks[0].get_weights())
        np.testing.assert_allclose(saved(np.ones((1, 4))), training.q, rtol=1e-4)  # evaluated
        final, played = arms[arm]["runs"][0]["final"], training.played
        assert final["greedy_reward"] == np.mean([len(states) for states in played])
        if script == double_q:
            errors = np.concatenate([double_q.overestimation(saved, states) for states in played])
            assert final["overestimation"] == pytest.approx(np.mean(errors), rel=1e-4)
        state, _ = gymnasium.make("CartPole-v1").reset(seed=1)
        np.testing.assert_array_equal(other.memory.rows[0, :4], state)
    flags += ["--seed", "1", "--arms", arm]  # the last arm, alone
    alone, beside = helpers.run_main(script, flags)[1][arm]["runs"][0], arms[arm]["runs"][1]
    assert (alone["history"], alone["final"]) == (beside["history"], beside["final"])
