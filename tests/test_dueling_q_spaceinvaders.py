"""dueling_q_spaceinvaders.py: frames, memory, gradient step, units, games, checkpoints."""

import collections
import types

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
    assert sorted(skips) == [2, 3, 4]  # difference 6: v5 has 4 only
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
    """No frame late, no stack over a start, no slot out of reach, before it is full and after."""
    rng, happened = np.random.default_rng(size), []
    np.random.seed(size)
    memory = script.Memory(tmp_path / "replay", size)
    assert 8400 <= (tmp_path / "replay").stat().st_size / size < 8500  # difference 3
    for added in (20, size - 1, size, size + 1, 2 * size, 2 * size + 1, 3 * size):
        while memory.added < added:
            play(memory, min(rng.integers(1, 20), added - memory.added - 1), rng, happened)
        check(memory, happened)


@pytest.mark.parametrize("added", [30, 85, 150, 151])
def test_nothing_is_stale_after_a_kill(tmp_path, added):
    rng, happened = np.random.default_rng(0), []
    memory = script.Memory(tmp_path / "replay", 50)
    while memory.added < added:
        play(memory, min(10, added - memory.added - 1), rng, happened)
    # Killed within add_sample: fields are written in their order, the number last
    place = (added + 1) % 50
    with pytest.raises(ValueError, match="killed"):
        memory.slots[place] = (255, 5, 77.0, True, True, "killed")
    assert memory.slots["frame"][place].min() == 255
    del memory
    memory = script.Memory(tmp_path / "replay", 50)
    assert memory.added == added
    for _ in range(8):  # it goes on with the start of a game, over the write head
        check(memory, happened)
        play(memory, 9, rng, happened)


# --- The network, its step, and its units ---
def test_network_is_the_articles_and_the_mean_is_over_the_actions():
    network = script.DQModel(256, 6)
    convolutions = (16, (8, 8), (4, 4), "relu"), (32, (4, 4), (2, 2), "relu")
    for name, expected in zip(("conv1", "conv2"), convolutions):
        layer = network.get_layer(name)
        found = layer.filters, layer.kernel_size, layer.strides, layer.activation.__name__
        assert found == expected
    hidden = [(name, 256, "relu", "HeNormal") for name in ("adv_dense", "v_dense")]
    outputs = [("adv_out", 6, "linear", "HeNormal"), ("v_out", 1, "linear", "HeNormal")]
    assert set(oracles.dense_layers(network)) == {*hidden, *outputs}
    assert network.count_params() == 16 * 193 + 32 * 257 + 2 * (11 * 8 * 32 + 1) * 256 + 257 * 7
    states = np.random.default_rng(0).integers(0, 256, (5, 3, 105, 80), "uint8")
    conv1 = keras.Model(network.input, network.get_layer("conv1").output)(states)
    scaled = np.moveaxis(states, 1, -1) / np.float32(255)  # a convolution wants the frames last
    np.testing.assert_allclose(conv1, network.get_layer("conv1")(scaled), atol=1e-6)
    streams = [network.get_layer(name).output for name in ("v_out", "adv_out")]
    v, adv = (part.numpy() for part in keras.Model(network.input, streams)(states))
    expected = v + adv - adv.mean(axis=1, keepdims=True)  # difference 4
    np.testing.assert_allclose(network(states), expected, atol=1e-4)
    assert np.ptp(adv.mean(axis=1)) > 1e-3


@pytest.mark.parametrize("double_q", [True, False])
def test_a_step_is_the_articles(monkeypatch, double_q):
    monkeypatch.setattr(script, "double_q", double_q)
    rng = np.random.default_rng(0)
    primary, target, theirs, judge = (script.DQModel(256, 6) for _ in range(4))
    theirs.set_weights(primary.get_weights())
    target.set_weights(judge.get_weights())
    adam = keras.optimizers.Adam(0.01)
    adam.build(primary.trainable_variables)
    frames = rng.integers(0, 256, (32, 4, 105, 80), dtype="uint8")
    actions, terminals = rng.integers(0, 6, 32, "uint8"), np.float32(np.arange(32) % 4 == 0)
    rewards = rng.normal(size=32).astype("float32")
    batch = frames[:, :3], actions, rewards, frames[:, 1:], terminals
    article = judge if double_q else theirs, batch, keras.optimizers.Adam(0.01)
    expected = oracles.train_as_the_article(theirs, *article, keras.losses.Huber(), 0.99)
    loss = tf.function(script.train)(primary, target, adam, frames, actions, rewards, terminals)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    oracles.assert_same(primary.get_weights(), theirs.get_weights(), atol=1e-5)
    pairs = zip(judge.get_weights(), primary.get_weights())
    oracles.assert_same(target.get_weights(), [0.999 * t + 0.001 * e for t, e in pairs], atol=1e-7)


@pytest.mark.parametrize(
    ("steps", "least"), [(300, 150), pytest.param(1500, 208, marks=pytest.mark.slow)]
)
def test_difference_1_units_stay_alive(monkeypatch, steps, least):
    """Of the advantage's 256 units so many answer on 64 screens, after steps on random play."""

    folders = []
    monkeypatch.setattr(script, "evaluate", lambda *arguments: 0.0)
    monkeypatch.setattr(script, "plot", lambda run: folders.append(run.folder))  # with its replay
    monkeypatch.setattr(script.pathlib.Path, "unlink", lambda path, missing_ok: None)
    flags = ["--delay-training", "6000", "--max-steps", str(6000 + steps), "--replay-size", "6500"]
    script.main(flags)
    network = keras.models.load_model(folders[0] / "dueling.keras")
    states = script.Memory(folders[0] / "replay", 6500).sample(64)[0][:, 1:]
    stream = keras.Model(network.input, network.get_layer("adv_dense").output)
    assert np.count_nonzero(np.max(stream(states), axis=0)) > least


# --- Games of 40 steps, and what a resumed run does ---
def test_games_and_those_of_a_resumed_run(monkeypatch):
    make_env, choose_action, steps = script.make_env, script.choose_action, tf.Variable(0.0)
    seeds, choices, networks, trained = [], [], [], []

    class Game(gymnasium.Wrapper):
        def reset(self, seed=None, options=None):
            seeds.append(seed)
            return super().reset(seed=seed)

    def build(*arguments):
        networks.append(model(*arguments))
        return networks[-1]

    def watched_choice(state, predict, eps):
        if not trained:  # difference 5: a copy
            oracles.assert_same(*[network.get_weights() for network in networks])
        choice = types.SimpleNamespace(eps=eps, state=state, random=np.random.get_state()[1])
        choice.q, choice.action = predict(state[np.newaxis]), choose_action(state, predict, eps)
        choices.append(choice)
        return choice.action

    def train(primary_network, target_network, optimizer, *batch):
        trained[:] = primary_network, target_network, optimizer
        gradients = [1.0 * weight for weight in primary_network.trainable_variables]
        script.update_network(primary_network, target_network, optimizer, gradients)
        return steps.assign_add(1.0)

    model = script.DQModel
    monkeypatch.setattr(script, "DQModel", build)
    monkeypatch.setattr(script, "make_env", lambda _: Game(make_env(40)))
    monkeypatch.setattr(script, "choose_action", watched_choice)
    monkeypatch.setattr(script, "train", train)
    flags = ["--max-steps", "150", "--delay-training", "50", "--epsilon-min-iter", "60"]
    flags += ["--replay-size", "120", "--seed", "5"]
    folder, arms = helpers.run_main(script, flags)
    rewards, final = arms["dueling"]["history"]["reward"], arms["dueling"]["final"]
    assert (final["steps"], final["random_reward"], len(rewards)) == (150, rewards[0], 4)
    expected = [1.0] * 51 + [1 - 0.9 * i / 60 for i in range(1, 61)] + [0.1] * 39 + [0] * 400
    np.testing.assert_allclose([choice.eps for choice in choices], expected, atol=1e-9)
    assert {choice.action for choice in choices[:51]} == set(range(6))
    greedy = choices[150:]
    assert [choice.action for choice in greedy] == [np.argmax(choice.q) for choice in greedy]
    assert seeds == [5, *[None] * 4, *range(1005, 1015)]  # no game of the training is judged
    saved = keras.models.load_model(folder / "dueling.keras")
    oracles.assert_same(saved.get_weights(), trained[0].get_weights())
    state = choices[-1].state[np.newaxis]
    np.testing.assert_allclose(saved(state), choices[-1].q, rtol=1e-4)  # that was evaluated
    assert trained[:2] == networks
    settings = trained[2].get_config()
    expected = keras.optimizers.Adam(2.5e-4, epsilon=3e-4).get_config()
    assert settings | {"name": ""} == expected | {"name": ""}
    with np.load(folder / "checkpoint.npz") as arrays:  # all of it, and as it was at the end
        counts, *values = arrays.values()
    assert counts.tolist() == [4, 150]
    kept = [*networks[0].variables, *networks[1].variables, *trained[2].variables]
    assert len(kept) == 12 + 12 + 24 + 2  # moments, iterations, learning rate
    oracles.assert_same(values, [variable.numpy() for variable in kept])

    first, seeds[:], choices[:] = choices[0], [], []
    _, arms = helpers.run_main(script, ["--resume", str(folder), "--max-steps", "230"])
    assert seeds == [5 + 4, *[None] * 2, *range(1005, 1015)]
    assert (choices[0].random != first.random).any()
    # Losses are counted 1, 2, 3, ...; the replay went with the end of the first run
    losses = [None, (1 + 30) / 2, (31 + 70) / 2, (71 + 100) / 2, None, (101 + 132) / 2]
    assert arms["dueling"]["history"]["avg loss"] == losses


def test_a_checkpoint_brings_back_everything(tmp_path):
    """Bit for bit, even where a kill cut the next one off."""
    path, rng = tmp_path / "checkpoint.npz", np.random.default_rng(0)
    variables = [tf.Variable(tf.zeros(shape)) for shape in ((2, 3), (), (4,))]
    for number in (1, 2):
        for variable in variables:
            variable.assign(rng.normal(size=variable.shape))
        script.save_checkpoint(path, [number, 10 * number], variables)
    (tmp_path / "checkpoint.new.npz").write_bytes(path.read_bytes()[:100])
    others = [tf.Variable(tf.zeros(variable.shape)) for variable in variables]
    assert script.restore_checkpoint(path, others) == [2, 20]
    oracles.assert_same([v.numpy() for v in variables], [v.numpy() for v in others])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.new.npz", path.name]
