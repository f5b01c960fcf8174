"""double_q_cartpole.py: Double Q by hand and in NumPy, and its differences from the article."""

import math
import re
import statistics

import numpy as np
import pytest
import tensorflow as tf
import watch_q
from helpers import Case
from PIL import Image, ImageSequence

import double_q_cartpole as script

keras = script.keras

ARMS = ["dqn", "double"]
CASE = Case(
    tiny=["--epochs", "25", "--epsilon-decay", "0.01"],
    final_epochs=dict.fromkeys(ARMS, 25),
    history=dict.fromkeys(ARMS, ["reward", "avg loss"]),
    events=dict.fromkeys(ARMS, {"scalars": {"reward", "avg loss"}}),
    figures=["max_bias.png", "reward.png"],
    started="/1000",  # the bar
    again="episode 50:",
    bad_flags=[
        ["--episodes", "0"],
        ["--max-steps", "0"],
        ["--random-reward-std", "-1"],
        ["--random-reward-std", "nan"],
        ["--epsilon-decay", "-0.1"],
        ["--gamma", "1.1"],
        ["--tau", "-0.1"],
        ["--runs", "0"],
        ["--arms"],
        ["--arms", "double", "dueling"],
        ["--device", "all"],
    ],
)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Return a tiny run of both arms, watched."""
    with pytest.MonkeyPatch.context() as patch:
        return watch_q.Watched(script, CASE.tiny, tmp_path_factory.mktemp("watched"), patch)


# --- Double Q ---


def targets(rewards, terminals, q_choosing, q_judging, gamma=0.5):
    columns = (tf.constant(values, tf.float32)[:, tf.newaxis] for values in (rewards, terminals))
    q = (tf.constant(values, tf.float32) for values in (q_choosing, q_judging))
    result = script.q_targets(*columns, *q, gamma)
    assert result.shape == (len(rewards), 1)
    return result.numpy().ravel().tolist()


def test_targets_by_hand():
    # One after the other: the judge agrees; it does not; a terminal; the time limit, no terminal
    rewards, terminals = [1.0, 1.0, 1.0, 2.0], [0, 0, 1, 0]
    primary = [[4.0, 2.0], [4.0, 2.0], [4.0, 2.0], [0.0, 6.0]]
    target = [[8.0, 6.0], [6.0, 8.0], [8.0, 6.0], [4.0, 2.0]]
    assert targets(rewards, terminals, primary, target) == [5.0, 4.0, 1.0, 3.0]
    assert targets(rewards, terminals, primary, primary) == [3.0, 3.0, 1.0, 5.0]  # the max


def test_soft_update_equals_the_articles_formula():
    keras.utils.set_random_seed(0)
    primary, target = script.build_model(), script.build_model()
    pairs = list(zip(target.get_weights(), primary.get_weights()))
    script.update_network(primary, target, 0.08)
    for weight, (t, e) in zip(target.get_weights(), pairs):
        np.testing.assert_allclose(weight, t * (1 - 0.08) + e * 0.08, atol=1e-7)
    for weight, (_, e) in zip(primary.get_weights(), pairs):
        np.testing.assert_array_equal(weight, e)
    script.update_network(primary, primary, 0.08)  # one network in both places
    for weight, (_, e) in zip(primary.get_weights(), pairs):
        np.testing.assert_array_equal(weight, e)


def numpy_forward(x, weights):
    """Return the layers' outputs of 4-30-30-2 for states (batch, 4): two hidden ones, then Q."""
    W1, b1, W2, b2, W3, b3 = weights
    h1 = np.maximum(x @ W1 + b1, 0)
    h2 = np.maximum(h1 @ W2 + b2, 0)
    return h1, h2, h2 @ W3 + b3


def numpy_step(batch, primary, target, moments, step, gamma, tau):
    """Return loss, primary, target and moments after a training step, as the article words it."""
    batch = batch.astype("float64")
    states, actions, next_states = batch[:, :4], batch[:, 4].astype(int), batch[:, 6:10]
    judge = primary if target is None else target
    goals = watch_q.numpy_targets(
        batch, numpy_forward(next_states, primary)[2], numpy_forward(next_states, judge)[2], gamma
    )
    h1, h2, q = numpy_forward(states, primary)
    target_q, rows = q.copy(), np.arange(len(batch))  # as the article: one entry a row is changed
    target_q[rows, actions] = goals
    loss = np.mean((q - target_q) ** 2)
    dq = 2 * (q - target_q) / q.size
    dh2 = (dq @ primary[4].T) * (h2 > 0)
    dh1 = (dh2 @ primary[2].T) * (h1 > 0)
    gradients = [states.T @ dh1, dh1.sum(0), h1.T @ dh2, dh2.sum(0), h2.T @ dq, dq.sum(0)]
    primary, moments = watch_q.numpy_adam(primary, gradients, moments, step)
    if target is not None:
        target = [t * (1 - tau) + e * tau for t, e in zip(target, primary)]
    return loss, primary, target, moments


@pytest.mark.parametrize("arm", ARMS)
def test_training_steps_equal_numpy(arm):
    keras.utils.set_random_seed(1)
    primary = script.build_model()
    target = script.build_model() if arm == "double" else primary  # other weights: they show
    optimizer = keras.optimizers.Adam()
    optimizer.build(primary.trainable_variables)
    learn = script.compile_for_shape(
        lambda batch: script.q_learning_step(batch, primary, target, optimizer, 0.95, 0.08),
        (32, 11),
    )
    weights = [weight.astype("float64") for weight in primary.get_weights()]
    followers = [weight.astype("float64") for weight in target.get_weights()]
    followers = followers if arm == "double" else None
    moments = [(0, 0)] * len(weights)
    rng = np.random.default_rng(0)
    for step in range(1, 6):
        batch = watch_q.make_batch(rng)
        loss = learn(tf.constant(batch))
        expected, weights, followers, moments = numpy_step(
            batch, weights, followers, moments, step, 0.95, 0.08
        )
        assert float(loss) == pytest.approx(expected, rel=1e-4)
        for weight, value in zip(primary.get_weights(), weights, strict=True):
            np.testing.assert_allclose(weight, value, atol=1e-4)
        for weight, value in zip(target.get_weights(), followers or weights, strict=True):
            np.testing.assert_allclose(weight, value, atol=1e-4)


def test_network_is_the_articles():
    keras.utils.set_random_seed(0)
    shapes = [weight.shape for weight in script.build_model().get_weights()]
    assert shapes == [(4, 30), (30,), (30, 30), (30,), (30, 2), (2,)]
    hidden = np.concatenate([script.build_model().get_weights()[2].ravel() for _ in range(20)])
    # He: sqrt(2 / inputs), of a normal cut off at two deviations and stretched to keep its own
    assert np.std(hidden) == pytest.approx(math.sqrt(2 / 30), rel=0.02)


def test_choose_action():
    def best_action(states):
        assert (states.shape, states.dtype) == ((1, 4), tf.float32)
        return tf.constant(1)

    keras.utils.set_random_seed(0)
    state = np.zeros(4, "float32")
    for eps, share in ((0, 1.0), (1, 0.5), (0.5, 0.75)):
        chosen = [script.choose_action(state, best_action, eps) for _ in range(2000)]
        assert set(chosen) <= {0, 1}
        assert np.mean(chosen) == pytest.approx(share, abs=0.04)


def test_epsilon_falls_without_a_jump(watched):
    steps = [memory.added for memory in watched.memories]
    assert len(watched.eps) == sum(steps)
    for eps in (watched.eps[: steps[0]], watched.eps[steps[0] :]):
        expected = [0.01 + 0.99 * math.exp(-0.01 * step) for step in range(len(eps))]
        assert eps == pytest.approx(expected, abs=1e-12)
        assert eps[0] == 1.0
        assert eps[-1] < 0.1


def test_max_bias_is_the_integrals(tmp_path, capsys):
    script.show_max_bias(0, tmp_path)
    means = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    below = [0.5 * (1 + math.erf((t - 1) / 4 / math.sqrt(2))) for t in np.arange(0.005, 40, 0.01)]
    maximum = sum(1 - p**2 for p in below) * 0.01  # of a variable that is never negative
    judged = 1 - below[0] ** 2  # 1, unless the largest is the 0 of A
    assert means == pytest.approx([1, 1, maximum, judged], abs=0.12)
    assert maximum > 3


# --- The memory ---


def stored(count, max_memory):
    """Return a Memory to which `count` steps have been added, each known by its number."""
    memory = script.Memory(max_memory)
    for i in range(count):
        memory.add_sample(np.full(4, i), i % 2, i + 0.5, np.full(4, i + 1), i % 3 == 0)
    return memory


@pytest.mark.parametrize("count", [1, 4, 6, 7, 8, 13, 14, 15, 100])
def test_memory_holds_the_newest_and_can_draw_each(count):
    keras.utils.set_random_seed(0)
    memory = stored(count, 7)
    held = min(count, 7)
    batch = memory.sample(held)  # without replacement: each once
    assert (batch.shape, batch.dtype) == ((held, 11), "float32")
    batch = batch[batch[:, 0].argsort()]
    i = np.arange(count - held, count)
    np.testing.assert_array_equal(batch[:, :4], np.repeat(i[:, None], 4, axis=1))
    np.testing.assert_array_equal(batch[:, 4], i % 2)
    np.testing.assert_array_equal(batch[:, 5], i + 0.5)
    np.testing.assert_array_equal(batch[:, 6:10], np.repeat(i[:, None] + 1, 4, axis=1))
    np.testing.assert_array_equal(batch[:, 10], i % 3 == 0)
    drawn = np.concatenate([memory.sample(1)[:, 0] for _ in range(60 * held)])
    assert np.bincount(drawn.astype(int) - i[0], minlength=held).min() > 30


# --- Differences from the article ---


def test_difference_1_the_time_limit_is_no_terminal(monkeypatch):
    watch_q.limit_steps(script, monkeypatch, 5)
    run = watch_q.Watched(script, ["--epochs", "3", "--arms", "double"], "log", monkeypatch)
    assert not run.memories[0].rows[:, 10].any()


def test_difference_1_a_fall_is_a_terminal(watched):
    for memory, record in zip(watched.memories, watched.results["arms"].values()):
        lengths = record["history"]["reward"]
        assert max(lengths) < 200
        assert np.flatnonzero(memory.rows[:, 10]).tolist() == (np.cumsum(lengths) - 1).tolist()


def test_stored_steps_follow_one_another(watched):
    rows = watched.memories[0].rows[: watched.memories[0].added]
    goes_on = rows[:-1, 10] == 0
    np.testing.assert_array_equal(rows[:-1, 6:10][goes_on], rows[1:, :4][goes_on])
    assert set(rows[:, 4]) == {0, 1}
    assert rows[:, 5].mean() == pytest.approx(1, abs=4 / math.sqrt(len(rows)))
    assert rows[:, 5].std() == pytest.approx(1, abs=4 / math.sqrt(len(rows)))


def test_difference_4_lengths_and_losses(watched):
    steps = [memory.added for memory in watched.memories]
    assert len(watched.losses) == sum(steps) - 2 * 95  # from the 96th step on
    losses = iter(watched.losses)
    for count, record in zip(steps, watched.results["arms"].values()):
        history = record["history"]
        assert sum(history["reward"]) == count
        done, untrained = 0, 0
        for length, avg_loss in zip(history["reward"], history["avg loss"]):
            trained = [next(losses) for step in range(done + 1, done + length + 1) if step >= 96]
            assert avg_loss == (pytest.approx(statistics.mean(trained)) if trained else None)
            done, untrained = done + length, untrained + (not trained)
        assert untrained >= 2


def test_difference_4_counts_by_hand(monkeypatch):
    watch_q.limit_steps(script, monkeypatch, 5)
    numbers, results, _ = watch_q.run(script, ["--epochs", "3", "--arms", "dqn"])
    assert results["arms"]["dqn"]["history"] == {"reward": [5, 5, 5], "avg loss": [None] * 3}
    assert numbers["dqn"]["greedy_reward"] == 5


def test_difference_5_all_networks_start_alike(watched):
    (dqn, same, *dqn_starts, _), (primary, target, *double_starts, _) = watched.traces
    assert same is dqn
    assert target is not primary
    first, *others = [*dqn_starts, *double_starts]
    for other in others:
        for one, two in zip(first, other, strict=True):
            np.testing.assert_array_equal(one, two)
    # and none of them stays there
    for network in (dqn, primary, target):
        moved = [np.abs(a - b).max() for a, b in zip(network.get_weights(), first)]
        assert min(moved) > 1e-3
    gaps = [np.abs(a - b).max() for a, b in zip(primary.get_weights(), target.get_weights())]
    assert min(gaps) > 0


def test_difference_6_each_arm_is_traced_once_and_never_eager(watched):
    assert [eager for *_, eager in watched.traces] == [False, False]
    assert len(watched.losses) > 300


# --- Runs ---


def test_seeds_arms_and_runs(watched):
    numbers, results, folder = watch_q.run(script, [*CASE.tiny, "--arms", "double", "--runs", "2"])
    among_both = watched.results["arms"]["double"]
    record = results["arms"]["double"]
    first, second = record["runs"]
    assert first["history"] == record["history"] == among_both["history"]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert second["history"]["reward"] != first["history"]["reward"]
    for metric, value in numbers["double"].items():
        values = [run["final"][metric] for run in (first, second)]
        assert value == pytest.approx(sum(values) / 2)
        spread = abs(values[0] - values[1]) / math.sqrt(2)
        assert record["spread"][metric] == pytest.approx(spread)
    assert sorted(path.name for path in (folder / "double").iterdir() if path.is_dir()) == [
        "seed_1"
    ]


def test_max_steps_cut_the_last_episode(monkeypatch):
    flags = ["--max-steps", "130", "--arms", "dqn"]
    run = watch_q.Watched(script, flags, "log", monkeypatch)
    assert sum(run.results["arms"]["dqn"]["history"]["reward"]) == 130
    assert run.memories[0].rows[129, 10] == 0  # truncated
    assert run.results["complete"]


def test_episodes_to_180_by_hand(monkeypatch):
    # Of the last 20 rewards two may be 10: 18 * 200 + 2 * 10 = 20 * 181
    lengths = [10] * 5 + [200] * 20
    monkeypatch.setattr(script.gymnasium, "make", lambda *a, **b: watch_q.Scripted(lengths))
    constant = {(1, 4): 0, (32, 11): 0.5}
    monkeypatch.setattr(script, "compile_for_shape", lambda f, shape: lambda x: constant[shape])
    numbers, results, _ = watch_q.run(script, ["--epochs", "25", "--arms", "dqn"])
    assert numbers["dqn"]["episodes_to_180"] == 5 + 18
    assert numbers["dqn"]["reward"] == 200
    assert numbers["dqn"]["greedy_reward"] == 1
    assert results["arms"]["dqn"]["history"]["reward"] == lengths


def test_episodes_to_180_where_it_is_never_reached(watched):
    assert watched.numbers["double"]["episodes_to_180"] == 26


@pytest.mark.parametrize("count", [1, 19, 20, 21, 50])
def test_moving_average(count):
    rewards = np.random.default_rng(0).integers(1, 200, count).tolist()
    expected = [statistics.mean(rewards[max(0, i - 20) : i]) for i in range(1, count + 1)]
    assert script.moving_average(rewards) == pytest.approx(expected)


def test_gif_is_one_greedy_episode(monkeypatch):
    watch_q.limit_steps(script, monkeypatch, 7)
    _, _, folder = watch_q.run(script, ["--epochs", "1", "--gif", "--arms", "dqn"])
    with Image.open(folder / "dqn.gif") as gif:
        assert gif.size == (600, 400)
        pauses = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
        assert len(pauses) > 4
        assert sum(pauses) == 8 * 20  # the start and each step; Pillow joins what looks the same
        assert gif.info["loop"] == 0


def test_reward_figure_shows_runs_of_unequal_length(tmp_path):
    runs = [{"history": {"reward": [10.0] * count}} for count in (30, 40)]
    results = {"arms": {"dqn": {"runs": runs}}, "config": {"random_reward_std": 1, "runs": 2}}
    script.plot(tmp_path, results)
    assert (tmp_path / "reward.png").exists()


def test_bar_and_lines(smoke_run):
    lines = re.findall(
        r"(\w+), seed (\d+), episode (\d+): reward \d+$",
        smoke_run("double_q_cartpole").stdout,
        re.M,
    )
    assert lines == [(arm, "0", str(i)) for arm in ARMS for i in range(1, 26)]


@pytest.mark.slow
@pytest.mark.parametrize("std", ["0", "1"])
def test_claim_both_reach_180(std):
    """Within 300 episodes, in three runs out of three: the mean of 20 episodes passes 180."""
    _, results, _ = watch_q.run(
        script, ["--random-reward-std", std, "--epochs", "300", "--runs", "3"]
    )
    for record in results["arms"].values():
        reached = [run["final"]["episodes_to_180"] for run in record["runs"]]
        assert max(reached) <= 300
