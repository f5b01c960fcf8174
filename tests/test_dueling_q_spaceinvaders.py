"""dueling_q_spaceinvaders.py: frames, memory, gradient step, units, games, checkpoints."""

import collections
from unittest import mock

import gymnasium
import helpers
import keras
import numpy as np
import oracles
import pytest
import tensorflow as tf

import dueling_q_spaceinvaders as script


def test_the_game_and_its_states_are_the_articles():
    env = script.make_env()
    first = script.start_game(env, seed=0)
    assert (first == script.image_preprocess(env.reset(seed=0)[0])).all()  # three times
    ale, skips = env.unwrapped.ale, collections.Counter()
    assert (ale.getFloat("repeat_action_probability"), env.action_space.n) == (0.25, 6)
    for _ in range(100):
        before = ale.getEpisodeFrameNumber()
        image, *_ = env.step(1)
        skips[ale.getEpisodeFrameNumber() - before] += 1
    assert sorted(skips) == [2, 3, 4]  # difference 7: v5 has 4 only
    # Without the rounding to whole numbers, which tf.image does once, and we at the end
    grey = tf.image.rgb_to_grayscale(tf.cast(image, tf.float32))
    exact = tf.image.resize(grey, (105, 80)).numpy()[:, :, 0]
    frame = script.image_preprocess(image)
    np.testing.assert_allclose(frame, exact, atol=0.501)
    stack = np.stack([frame, frame // 2, frame // 3])
    moved = script.process_state_stack(stack, frame // 4)
    np.testing.assert_array_equal(moved, [frame // 2, frame // 3, frame // 4])


# --- The memory, beside a list of all that happened ---
def play(memory, steps, rng, happened):
    """Store a game whose frames are filled with their number; note its steps."""
    game = [memory.added] * 3
    memory.add_sample(np.full((105, 80), memory.added), start=True)
    for _ in range(steps):
        step = int(rng.integers(6)), float(rng.integers(9)), bool(rng.random() < 0.3)
        game.append(memory.added)
        memory.add_sample(np.full((105, 80), memory.added), *step)
        happened.append((tuple(game[-4:]), *step))


def check(memory, happened, draws=300):
    """All steps whose frames are among the newest are drawn, equally often, and no others."""
    oldest = memory.added - len(memory.slots) + 1  # the frame before it may be half written
    expected = {step for step in happened if min(step[0]) >= oldest}
    found = collections.Counter()
    for _ in range(draws):
        frames, actions, rewards, terminals = memory.sample(32)
        assert (frames == frames[:, :, :1, :1]).all()
        columns = actions.tolist(), rewards.tolist(), (terminals == 1).tolist()
        found.update(zip(map(tuple, frames[:, :, 0, 0].tolist()), *columns))
    assert set(found) == expected
    mean = 32 * draws / len(expected)
    assert max(abs(n - mean) for n in found.values()) < 6 * mean**0.5


@pytest.mark.parametrize("size", [40, 57, 80])
def test_difference_2_memory_gives_what_happened_each_alike(tmp_path, size):
    """No frame late, no stack over a start, no slot out of reach, before it is full and after.

    It is killed each time within add_sample: fields are written in their order, the number last.
    """
    rng, happened = np.random.default_rng(size), []
    memory = script.Memory(tmp_path / "replay", size)
    assert 8400 <= (tmp_path / "replay").stat().st_size / size < 8500  # difference 3
    for added in (20, size - 1, size, size + 1, 2 * size, 2 * size + 1, 3 * size):
        while memory.added < added:
            play(memory, min(rng.integers(1, 20), added - memory.added - 1), rng, happened)
        with pytest.raises(ValueError, match="killed"):
            memory.slots[(added + 1) % size] = (255, 5, 77.0, True, True, "killed")
        assert memory.slots["frame"].max() == 255
        memory = script.Memory(tmp_path / "replay", size)
        assert memory.added == added
        check(memory, happened)


# --- The network, its step, and its units ---
def test_network_is_the_articles_and_difference_4_the_mean_is_over_the_actions():
    network = script.DQModel(256, 6)
    begin = ["InputLayer", "Conv2D 16 (8, 8) (4, 4) valid relu"]
    begin += ["Conv2D 32 (4, 4) (2, 2) valid relu", "Flatten"]
    streams = ["Dense 256 relu HeNormal"] * 2
    streams += ["Dense 6 linear HeNormal", "Dense 1 linear HeNormal", "Add"]
    layers = oracles.layers_as_text(network)
    assert (layers[:4], sorted(layers[4:])) == (begin, sorted(streams))
    states = np.random.default_rng(0).integers(0, 256, (5, 3, 105, 80), "uint8")
    scaled = np.moveaxis(states, 1, -1) / np.float32(255)  # a convolution wants the frames last
    x = network.get_layer("conv2")(network.get_layer("conv1")(scaled))
    oracles.check_dueling(network, states, keras.layers.Flatten()(x))


@pytest.mark.parametrize("double_q", [True, False])
def test_a_step_is_the_articles(monkeypatch, double_q):
    monkeypatch.setattr(script, "double_q", double_q)
    rng = np.random.default_rng(0)
    primary, target, theirs, judge = (script.DQModel(256, 6) for _ in range(4))
    theirs.set_weights(primary.get_weights())
    target.set_weights(judge.get_weights())
    sgd, their_sgd = keras.optimizers.SGD(1.0), keras.optimizers.SGD(1.0)  # steps are gradients
    sgd.build(primary.trainable_variables)
    frames = rng.integers(0, 256, (32, 4, 105, 80), dtype="uint8")
    actions, terminals = rng.integers(0, 6, 32, "uint8"), np.float32(np.arange(32) % 4 == 0)
    rewards = rng.normal(size=32).astype("float32")
    batch = frames[:, :3], actions, rewards, frames[:, 1:], terminals
    article = judge if double_q else theirs, batch, their_sgd
    expected = oracles.train_as_the_article(theirs, *article, keras.losses.Huber(), 0.99)
    loss = tf.function(script.train)(primary, target, sgd, frames, actions, rewards, terminals)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    oracles.assert_same(primary.get_weights(), theirs.get_weights(), atol=1e-6)
    pairs = zip(judge.get_weights(), primary.get_weights())
    oracles.assert_same(target.get_weights(), [0.999 * t + 0.001 * e for t, e in pairs], atol=1e-7)


@pytest.mark.parametrize(
    ("steps", "least"), [(300, 150), pytest.param(1500, 208, marks=pytest.mark.slow)]
)
def test_difference_1_units_stay_alive(monkeypatch, steps, least):
    """Of the advantage's 256 units so many answer on 64 screens, after steps on random play."""
    monkeypatch.setattr(script, "evaluate", lambda *arguments: {})
    monkeypatch.setattr(script.pathlib.Path, "unlink", mock.Mock())  # the replay is kept
    flags = ["--delay-training", "6000", "--max-steps", str(6000 + steps), "--replay-size", "6500"]
    folder, _ = helpers.run_main(script, flags)
    network = keras.models.load_model(folder / "dueling.keras")
    states = script.Memory(folder / "replay", 6500).sample(64)[0][:, 1:]
    stream = keras.Model(network.input, network.get_layer("adv_dense").output)
    assert np.count_nonzero(np.max(stream(states), axis=0)) > least


# --- Games of 40 steps, and what a resumed run does ---
def test_games_and_those_of_a_resumed_run(monkeypatch):
    make_env, choose_action, steps = script.make_env, script.choose_action, tf.Variable(0.0)
    env = gymnasium.wrappers.TransformReward(make_env(40), lambda reward: 20.0)
    choices, random_states, trained = [], [], []
    env.reset = mock.Mock(wraps=env.reset)

    def watched_choice(state, predict, eps):
        random_states.append(np.random.get_state()[1])
        action = choose_action(state, predict, eps)
        choices.append((eps, action, state[np.newaxis], predict(state[np.newaxis])))
        return action

    def train(primary_network, target_network, optimizer, *batch):
        with tf.init_scope():  # a training calls it once, to compile it
            parts = primary_network, target_network, optimizer
            variables = [variable for part in parts for variable in part.variables]
            trained.append((*parts, variables, [variable.numpy() for variable in variables]))
        gradients = [1.0 * weight for weight in primary_network.trainable_variables]
        script.update_network(primary_network, target_network, optimizer, gradients)
        return steps.assign_add(1.0)

    monkeypatch.setattr(script, "make_env", lambda max_steps: env)
    monkeypatch.setattr(script, "choose_action", watched_choice)
    monkeypatch.setattr(script, "train", train)
    add_sample = script.Memory.add_sample
    stored = mock.create_autospec(add_sample, side_effect=add_sample)
    monkeypatch.setattr(script.Memory, "add_sample", stored)
    flags = ["--max-steps", "150", "--delay-training", "50", "--epsilon-min-iter", "60"]
    folder, arms = helpers.run_main(script, [*flags, "--replay-size", "120", "--seed", "5"])
    rewards, final = arms["dueling"]["history"]["reward"], arms["dueling"]["final"]
    assert (final["steps"], final["random_reward"], len(rewards)) == (150, rewards[0], 4)
    signs = [call.args[3] for call in stored.mock_calls if len(call.args) > 3]
    assert (signs, rewards) == ([1] * 150, [800, 800, 800, 600])  # difference 1
    assert final["greedy_reward"] == 800  # in points, as all that is recorded
    epsilons, actions, states, q_values = zip(*choices)
    expected = [*np.interp(range(150), [50, 50 + 60], [1, 0.1]), *[0] * 400]  # without a jump
    np.testing.assert_allclose(epsilons, expected, atol=1e-9)
    assert set(actions[:51]) == set(range(6))
    assert list(actions[150:]) == [np.argmax(q) for q in q_values[150:]]
    ((primary, target, optimizer, variables, first_values),) = trained
    oracles.assert_same(first_values[:12], first_values[12:24])  # difference 5: a copy
    oracles.check_adam(optimizer, learning_rate=6.25e-5, epsilon=1.5e-4)
    saved = keras.models.load_model(folder / "dueling.keras")
    oracles.assert_same(saved.get_weights(), primary.get_weights())
    assert saved.optimizer.iterations == optimizer.iterations == 100  # compiled
    np.testing.assert_allclose(saved(states[-1]), q_values[-1], rtol=1e-4)  # that was evaluated
    with np.load(folder / "checkpoint.npz") as arrays:  # all of it, and as it was at the end
        counts, *values = arrays.values()
    assert counts.tolist() == [4, 150]
    assert len(values) == 12 + 12 + 24 + 2  # moments, iterations, learning rate
    oracles.assert_same(values, [variable.numpy() for variable in variables])

    _, arms = helpers.run_main(script, ["--resume", str(folder), "--max-steps", "230"])
    seeds, judged = [call.kwargs["seed"] for call in env.reset.mock_calls], [*range(1005, 1015)]
    assert seeds == [5, *[None] * 4, *judged, 5 + 4, *[None] * 2, *judged]
    assert (random_states[0] != random_states[150 + 400]).any()
    oracles.assert_same(trained[1][-1], values)
    # Losses are counted 1, 2, 3, ...; the replay went with the end of the first run
    losses = [None, (1 + 30) / 2, (31 + 70) / 2, (71 + 100) / 2, None, (101 + 132) / 2]
    assert arms["dueling"]["history"]["avg loss"] == losses
