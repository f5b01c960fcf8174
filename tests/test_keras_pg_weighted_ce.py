"""keras_pg_weighted_ce.py: the identity against independent ones, Pong, the agent, resuming."""

import json
import shutil
import signal

import gymnasium
import helpers
import numpy as np
import pytest
import tensorflow as tf
from helpers import Case, finish, start
from PIL import Image

import keras_pg_weighted_ce as script
import reinforce_cartpole

keras = script.keras

CASE = Case(
    tiny=["--epochs", "12"],
    final_epochs={"identity": 9, "agent": 12},
    history={"identity": ["samples", "error"], "agent": ["reward", "avg loss", "steps"]},
    events={
        "identity": {"scalars": {"error"}},
        "agent": {"scalars": {"reward", "avg loss", "steps"}},
    },
    figures=["agent.png", "identity.png"],
    started="/1500",
    again="episode 10/",
    bad_flags=[
        ["--episodes", "0"],
        ["--max-steps", "0"],
        ["--env", "Pong-v0"],
        ["--arms", "identity", "pong"],
        ["--arms"],
        ["--resume", "no/such/run"],
        ["--device", "all"],
    ],
)


# --- Part 1: the identity ---


def problem(seed=0):
    """Return a policy q = softmax(s W), states (8, 3) and known rewards (8, 4)."""
    keras.utils.set_random_seed(seed)
    states, rewards = np.random.normal(size=(8, 3)), np.random.normal(size=(8, 4))
    inputs = keras.Input((3,))
    outputs = keras.layers.Dense(4, activation="softmax", use_bias=False)(inputs)
    return keras.Model(inputs, outputs), states, rewards


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def expected_reward(W, states, rewards):
    return np.mean(np.sum(softmax(states @ W) * rewards, axis=1))


def relative_error(gradient, exact):
    return np.linalg.norm(gradient - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("seed", [0, 1])
def test_exact_gradient_equals_finite_differences(seed):
    policy, states, rewards = problem(seed)
    W, step = policy.get_weights()[0].astype("float64"), 1e-6
    expected = np.zeros_like(W)
    for place in np.ndindex(W.shape):
        nudge = np.zeros_like(W)
        nudge[place] = step
        rise = expected_reward(W + nudge, states, rewards)
        expected[place] = (rise - expected_reward(W - nudge, states, rewards)) / (2 * step)
    gradient = script.exact_gradient(policy(states).numpy(), states, rewards)
    assert relative_error(gradient, expected) < 1e-6


def every_action(policy, states, rewards):
    """Return states, one-hot actions and weights: 4 q f for each action, as Keras divides by 32."""
    idx, actions = np.indices(rewards.shape).reshape(2, -1)
    return states[idx], np.eye(4)[actions], 4 * (policy(states).numpy() * rewards)[idx, actions]


def test_weighted_cross_entropy_has_the_exact_gradient():
    policy, states, rewards = problem()
    exact = script.exact_gradient(policy(states).numpy(), states, rewards)
    states, targets, weights = every_action(policy, states, rewards)
    gradient = script.weighted_ce_gradient(policy, states, targets, weights)
    assert relative_error(gradient, exact) < 1e-5
    # and so has `train_on_batch` with sample weights: plain descent with rate 1 moves W by it
    policy.compile(loss="categorical_crossentropy", optimizer=keras.optimizers.SGD(1.0))
    before = policy.get_weights()[0]
    policy.train_on_batch(states, targets, sample_weight=weights)
    assert relative_error(policy.get_weights()[0] - before, exact) < 1e-5


def test_difference_1_the_gradient_points_uphill():
    policy, states, rewards = problem()
    W = policy.get_weights()[0]
    gradient = script.weighted_ce_gradient(policy, *every_action(policy, states, rewards))
    here, there = (expected_reward(W + step * gradient, states, rewards) for step in (0, 0.01))
    assert there - here == pytest.approx(0.01 * np.sum(gradient**2), rel=0.05)


def test_difference_2_more_samples_do_not_make_it_longer():
    policy, states, rewards = problem()
    exact = np.linalg.norm(script.exact_gradient(policy(states).numpy(), states, rewards))
    for num_samples in (3000, 30000):
        sampled = script.monte_carlo_gradient(policy, states, rewards, num_samples)
        assert np.linalg.norm(sampled) == pytest.approx(exact, rel=0.3)


def spread_of_one_sample(policy, states, rewards):
    """Return the root mean square error of one sample's gradient, exactly: each can be listed."""
    q = softmax(states @ policy.get_weights()[0])
    exact, mean_square = script.exact_gradient(q, states, rewards), 0
    for s, a in np.ndindex(rewards.shape):
        one = rewards[s, a] * np.outer(states[s], np.eye(4)[a] - q[s])  # r grad log q(a|s)
        mean_square += q[s, a] / len(states) * np.sum(one**2)
    return np.sqrt(mean_square - np.sum(exact**2)) / np.linalg.norm(exact)


def test_the_sampled_gradients_error_falls_as_one_over_the_root():
    final = script.main(["--arms", "identity", "--seed", "5"])["identity"]
    assert final["slope"] == pytest.approx(-0.5, abs=0.1)
    assert final["weighted_error"] < 1e-5
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    results = json.loads(path.read_text())
    assert list(results["arms"]) == ["identity"]
    history = results["arms"]["identity"]["history"]
    assert history["error"][-1] == final["sampled_error"]
    expected = spread_of_one_sample(*problem(5)) / np.sqrt(history["samples"])
    np.testing.assert_allclose(history["error"], expected, rtol=0.35)


# --- Part 2: the agent ---


def cartpole_episode():
    """Play CartPole with a policy fresh from the seed; return network and episode."""
    keras.utils.set_random_seed(4)
    network, env = script.build_model(False, 4), script.make_env()
    policy = script.compile_policy(network)
    env.reset(seed=4)
    return network, *script.play_episode(env, lambda state: script.get_action(policy, state))


def moved(network, update):
    """Return by how much `update()` moves the weights, and put them back."""
    before = network.get_weights()
    update()
    difference = [new - old for old, new in zip(before, network.get_weights())]
    network.set_weights(before)
    return np.concatenate([part.ravel() for part in difference])


def test_the_update_equals_that_of_reinforce_and_the_trap_does_not():
    network, states, actions, rewards = cartpole_episode()
    returns = script.standardise(script.discounted_returns(rewards, 0.95))
    network.compile(loss="categorical_crossentropy", optimizer=keras.optimizers.SGD(1.0))
    targets = np.eye(2)[actions]
    ours = moved(network, lambda: network.train_on_batch(states, targets, sample_weight=returns))
    tensors = reinforce_cartpole.pad_episode(states, actions, returns, 200)
    sgd = keras.optimizers.SGD(1.0)
    sgd.build(network.trainable_variables)
    theirs = moved(network, lambda: reinforce_cartpole.update_network(network, sgd, *tensors))
    assert relative_error(ours, theirs) < 1e-5
    trap = returns[:, None] * targets  # see reinforce_cartpole.py
    assert (
        relative_error(moved(network, lambda: network.train_on_batch(states, trap)), theirs) > 0.1
    )


def test_difference_3_training_takes_this_step(monkeypatch):
    """main's own update, from its first episode, is train_on_batch with standardised returns."""
    seen = []
    train_on_batch = keras.Model.train_on_batch

    def watched(self, x, y, sample_weight):
        seen.append((x, y, sample_weight))
        return train_on_batch(self, x, y, sample_weight)

    monkeypatch.setattr(keras.Model, "train_on_batch", watched)
    script.main(["--arms", "agent", "--epochs", "3"])
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    rewards = json.loads(path.read_text())["arms"]["agent"]["history"]["reward"]
    assert [len(x) for x, _, _ in seen] == rewards
    for states, targets, weights in seen:
        assert set(np.unique(targets)) <= {0, 1}
        assert targets.sum(1).tolist() == [1] * len(states)
        returns = (1 - 0.95 ** np.arange(len(states), 0, -1)) / 0.05  # a reward of one a step
        np.testing.assert_allclose(weights, (returns - returns.mean()) / returns.std(), rtol=1e-6)


def test_returns_of_points_by_hand(monkeypatch):
    """In Pong a point ends the discounting, and a game the standardisation."""
    game = np.array([0.0, 0, 1, 0, -1, 0])  # three steps to a point won, two to one lost, one more
    states, seen = np.zeros((6, 6400), "float32"), []
    monkeypatch.setattr(script, "play_episode", lambda *_: [states, np.array([0] * 6), game])
    monkeypatch.setitem(script.GAMMA, "ALE/Pong-v5", 0.5)
    train_on_batch = keras.Model.train_on_batch

    def watched(self, x, y, sample_weight):
        seen.append(sample_weight)
        return train_on_batch(self, x, y, sample_weight)

    monkeypatch.setattr(keras.Model, "train_on_batch", watched)
    script.main(["--env", "ALE/Pong-v5", "--arms", "agent", "--epochs", "2"])
    returns = np.array([0.25, 0.5, 1, -0.5, -1, 0])
    for weights in seen:
        np.testing.assert_allclose(weights, (returns - returns.mean()) / returns.std())
    assert len(seen) == 2


def test_networks_are_those_of_the_two_articles():
    cartpole, reinforce = script.build_model(False, 4), reinforce_cartpole.build_model()
    assert cartpole.count_params() == reinforce.count_params()
    assert type(cartpole.optimizer).__name__ == "Adam"
    pong = script.build_model(True, 6400)
    assert pong.count_params() == 6400 * 200 + 200 + 200 * 2 + 2
    config = pong.optimizer.get_config()
    assert (type(pong.optimizer).__name__, config["rho"]) == ("RMSprop", 0.99)
    assert config["learning_rate"] == pytest.approx(1e-4)
    assert script.GAMMA == {"CartPole-v1": 0.95, "ALE/Pong-v5": 0.99}
    args = script.parse_args([])
    assert (args.env, args.epochs, args.arms) == ("CartPole-v1", 1500, ["identity", "agent"])


def test_pong_steps_once_in_ten_episodes():
    keras.utils.set_random_seed(0)
    network = script.build_model(True, 4)
    rng = np.random.default_rng(0)
    before, gradients = network.get_weights(), []
    for episode in range(10):
        length = 5 + episode
        states = rng.normal(size=(length, 4)).astype("float32")
        targets, weights = np.eye(2)[rng.integers(0, 2, length)], rng.normal(size=length)
        with tf.GradientTape() as tape:
            loss = keras.losses.CategoricalCrossentropy()(targets, network(states), weights)
        gradients.append(tape.gradient(loss, network.trainable_variables))
        for one, other in zip(before, network.get_weights()):
            np.testing.assert_array_equal(one, other)  # not yet
        network.train_on_batch(states, targets, sample_weight=weights)
    for old, new, parts in zip(before, network.get_weights(), zip(*gradients)):
        gradient = np.mean(parts, axis=0)
        step = 1e-4 * gradient / np.sqrt(0.01 * gradient**2 + 1e-7)  # RMSprop's first
        np.testing.assert_allclose(new - old, -step, rtol=1e-3, atol=1e-7)


# --- Pong ---


def court_of(frame):
    """Return the court (80, 80) of a frame (210, 160, 3): what differs from its ground."""
    court, ground = np.zeros((80, 80), "float32"), frame[60, 80, 0]
    for row, column in np.ndindex(80, 80):
        court[row, column] = frame[34 + 2 * row, 2 * column, 0] != ground
    return court


def test_preprocess_of_real_frames():
    env = gymnasium.make("ale_py:ALE/Pong-v5")
    frames, grounds = [env.reset(seed=0)[0]], set()
    for i in range(80):
        frames.append(env.step(2 + i % 2)[0])
    for frame, new_frame in zip(frames, frames[1:]):
        state = script.preprocess(np.stack([frame, new_frame]))
        assert (state.shape, state.dtype) == ((6400,), "float32")
        court, new_court = court_of(frame), court_of(new_frame)
        np.testing.assert_array_equal(state, (new_court - court).ravel())
        assert 0 < new_court.sum() < 100  # bats of 16 x 4 pixels at most, and the ball
        assert not new_court.all(1).any()  # the cut leaves neither walls nor the score
        grounds.add(int(frame[60, 80, 0]))
    assert grounds == {109, 144}  # before the start, and in play
    assert np.any(state)


def bat(frame):
    """Return the mean row of the agent's bat in the court of a frame."""
    rows = np.flatnonzero(court_of(frame)[:, 70:72].any(1))
    return rows.mean() if len(rows) else None


@pytest.mark.parametrize(("action", "sign"), [(0, -1), (1, 1)], ids=["up", "down"])
def test_actions_move_the_bat_up_and_down(action, sign):
    env = script.make_pong()
    env.reset(seed=1)
    raw = env.unwrapped
    for _ in range(40):
        frame, *_ = raw.step(0)
    before = bat(frame)
    for _ in range(5):
        env.step(action)
    after = bat(raw.ale.getScreenRGB())
    assert sign * (after - before) > 10


def test_states_of_pong_are_differences_of_courts():
    env = script.make_pong("rgb_array")
    state, _ = env.reset(seed=0)
    assert (state.shape, state.dtype, state.any()) == ((6400,), np.float32, False)
    assert env.observation_space.shape == (6400,)
    court = court_of(env.render())
    moving = 0
    for i in range(60):
        state, *_ = env.step(i % 2)
        new_court = court_of(env.render())
        np.testing.assert_array_equal(state, (new_court - court).ravel())
        moving += state.any()
        court = new_court
    assert moving > 30


@pytest.fixture
def short_pong(monkeypatch):
    """Let a game of Pong end after 120 steps: a point or two."""
    make_pong = script.make_pong
    monkeypatch.setattr(
        script, "make_pong", lambda mode=None: gymnasium.wrappers.TimeLimit(make_pong(mode), 120)
    )


def test_pong_trains_resumes_and_saves_an_animation(short_pong):
    flags = ["--env", "ALE/Pong-v5", "--arms", "agent"]
    final = script.main([*flags, "--epochs", "12", "--gif"])["agent"]
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    results, run_dir = json.loads(path.read_text()), path.parent
    assert results["data"] == "ALE/Pong-v5"
    rewards = results["arms"]["agent"]["history"]["reward"]
    assert len(rewards) == 12
    assert final["reward"] == np.mean(rewards) < 0
    with Image.open(run_dir / "agent.gif") as animation:
        assert (animation.size, animation.n_frames > 10) == ((160, 210), True)
    keras.utils.set_random_seed(0)
    first = script.build_model(True, 6400).get_weights()
    saved = keras.models.load_model(run_dir / "agent.keras").get_weights()
    assert any(np.abs(a - b).max() > 1e-5 for a, b in zip(first, saved))
    script.main(["--resume", str(run_dir), "--epochs", "15"])
    resumed = json.loads(path.read_text())["arms"]["agent"]["history"]["reward"]
    assert len(resumed) == 15
    assert resumed[:12] == rewards


def test_a_loss_that_is_not_finite(monkeypatch, capsys):
    """It makes the policy nan: the game goes on, and the run ends in one line."""
    build_model = script.build_model

    def with_a_huge_rate(*args):
        network = build_model(*args)
        network.compile(keras.optimizers.SGD(1e38), "categorical_crossentropy")
        return network

    monkeypatch.setattr(script, "build_model", with_a_huge_rate)
    flags = ["--arms", "agent", "--epochs", "30"]
    code, line = helpers.fails_in_one_line(
        lambda: script.run_as_command(lambda: script.main(flags)), capsys
    )
    assert (code, "not finite" in line) == (1, True)
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    assert json.loads(path.read_text())["complete"] is False


def test_max_steps_cuts_the_last_episode():
    script.main(["--arms", "agent", "--epochs", "50", "--max-steps", "100"])
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    rewards = json.loads(path.read_text())["arms"]["agent"]["history"]["reward"]
    assert sum(rewards) == 100  # a reward of one a step
    assert 1 < len(rewards) < 50
    script.main(["--resume", str(path.parent)])  # nothing is left to play
    assert json.loads(path.read_text())["arms"]["agent"]["history"]["reward"] == rewards


def test_weights_move(smoke_run):
    keras.utils.set_random_seed(0)
    first = script.build_model(False, 4).get_weights()
    saved = keras.models.load_model(smoke_run("keras_pg_weighted_ce").folder / "agent.keras")
    assert min(np.abs(a - b).max() for a, b in zip(first, saved.get_weights())) > 1e-4


# --- Resuming ---


class Killed(BaseException):
    """Ends a run as a kill does: nothing in the script catches it."""


def strike(monkeypatch, owner, name, count, after=False):
    """Let the `count`th call of owner.name raise Killed, before or after it has done its work."""
    original, calls = getattr(owner, name), []

    def struck(*args, **options):
        calls.append(1)
        if len(calls) == count and not after:
            raise Killed
        value = original(*args, **options)
        if len(calls) == count:
            raise Killed
        return value

    monkeypatch.setattr(owner, name, struck)


def test_resume_after_kills(monkeypatch, tmp_path):
    from tensorflow.python.checkpoint import checkpoint_management as management

    flags, saves = ["--arms", "agent", "--epochs", "45"], tf.train.CheckpointManager
    kills = [  # what is struck, at which call, after it?, and the episodes then in results.json
        (script, "write_results", 2, False, 0),
        (script.os, "replace", 3, False, 20),  # the 30 are half written
        (saves, "save", 1, False, 30),  # their checkpoint is missing
        (management, "update_checkpoint_state_internal", 1, False, 30),  # half a checkpoint
        (saves, "save", 1, True, 30),
        (script.keras.Model, "save", 1, False, 45),  # after the greedy evaluation
        (script, "plot", 1, False, 45),
    ]
    for owner, name, count, after, written in kills:
        with monkeypatch.context() as patch:
            strike(patch, owner, name, count, after)
            with pytest.raises(Killed):
                script.main(flags)
        (path,) = tmp_path.glob("log/*/*/results.json")
        results = json.loads(path.read_text())
        assert results["complete"] is False
        record = results["arms"].get("agent", {"history": {"reward": []}})
        assert len(record["history"]["reward"]) == written
        flags = ["--resume", str(path.parent)]
    script.main(flags)
    results = json.loads(path.read_text())
    assert results["complete"] is True
    history = results["arms"]["agent"]["history"]
    assert [len(values) for values in history.values()] == [45, 45, 45]


def test_a_real_kill(tmp_path):
    code = """
import os, signal, keras_pg_weighted_ce as script
save = script.tf.train.CheckpointManager.save
def struck(self):
    if int(self.checkpoint.episodes) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self)
script.tf.train.CheckpointManager.save = struck
script.main(["--arms", "agent", "--epochs", "30"])
"""
    run = finish(start(["-c", code], tmp_path), tmp_path)
    assert run.code == -signal.SIGKILL, run.stderr
    written = run.results["arms"]["agent"]["history"]["reward"]
    assert len(written) == 20
    script.main(["--resume", str(run.folder)])
    results = json.loads((run.folder / "results.json").read_text())
    rewards = results["arms"]["agent"]["history"]["reward"]
    assert len(rewards) == 30
    assert rewards[:10] == written[:10]
    assert rewards[10:20] != written[10:20]  # the interrupted ten were played again


def test_a_resumed_agent_takes_the_same_next_step(tmp_path):
    """Weights, moments and half-gathered gradients come back."""
    rng = np.random.default_rng(0)
    states, targets = rng.normal(size=(12, 6, 4)), np.eye(2)[rng.integers(0, 2, (12, 6))]
    networks = []
    for _ in range(2):
        network = script.build_model(True, 4)
        episodes = tf.Variable(0, dtype=tf.int64)
        objects = {"model": network, "optimizer": network.optimizer, "episodes": episodes}
        manager = script.open_checkpoint(tmp_path, **objects)
        networks.append(network)
        assert network.optimizer.built  # else TensorFlow warns where nothing is left to train
        if not int(episodes):
            for i in range(7):
                network.train_on_batch(states[i], targets[i], sample_weight=rng.normal(size=6))
            episodes.assign(7)
            manager.save()
    weights = rng.normal(size=(12, 6))
    for network in networks:
        before = network.get_weights()
        for i in range(7, 10):
            network.train_on_batch(states[i], targets[i], sample_weight=weights[i])
        assert np.abs(network.get_weights()[0] - before[0]).max() > 1e-5
    for one, other in zip(*(network.get_weights() for network in networks), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_finished_identity_is_not_computed_again(smoke_run, tmp_path, monkeypatch):
    run_dir = tmp_path / "copy"
    shutil.copytree(smoke_run("keras_pg_weighted_ce").folder, run_dir)
    monkeypatch.setattr(script, "show_identity", None)
    before = json.loads((run_dir / "results.json").read_text())["arms"]
    script.main(["--resume", str(run_dir)])
    assert json.loads((run_dir / "results.json").read_text())["arms"] == before
    script.main(["--resume", str(run_dir), "--epochs", "14"])
    after = json.loads((run_dir / "results.json").read_text())["arms"]
    assert after["identity"] == before["identity"]
    assert len(after["agent"]["history"]["reward"]) == 14


@pytest.mark.parametrize("kind", ["data-00000-of-00001", "index"])
def test_damaged_checkpoint(smoke_run, tmp_path, capsys, kind):
    code, line = helpers.resume_a_damaged_checkpoint(
        script, smoke_run("keras_pg_weighted_ce"), kind, tmp_path, capsys
    )
    assert (code, "damaged" in line, "checkpoint" in line) == (1, True, True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_claim_the_agent_learns(seed):
    """The network of reinforce_cartpole.py, by Keras's own training: far above chance's 22."""
    assert script.main(["--arms", "agent", "--seed", str(seed)])["agent"]["reward"] > 60
