"""dueling_q_cartpole.py: the dueling network by hand and in NumPy, and each difference.

What it shares with double_q_cartpole.py, word for word, is tested in test_double_q_cartpole.py.
"""

import inspect
import json
import pathlib
import re
import statistics
import types
import zipfile

import numpy as np
import pytest
import tensorflow as tf
from test_double_q_cartpole import Scripted, random_batch, step_of_descent, train_scripted

import double_q_cartpole
import dueling_q_cartpole as script

keras = script.keras

STATES = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
SAME = ["Memory", "choose_action", "update_network", "overestimation", "evaluate"]


@pytest.mark.parametrize("name", SAME)
def test_what_both_scripts_share_is_the_same_text(name):
    texts = [inspect.getsource(getattr(module, name)) for module in (script, double_q_cartpole)]
    assert texts[0] == texts[1]


def network(actions=2, seed=0):
    """Return a dueling network and its parts: Q, V and A (each a model of states)."""
    keras.utils.set_random_seed(seed)
    q = script.DQModel(30, actions, dueling=True)
    for layer in q.layers:  # biases start at zero, and would hide their part
        if layer.weights:
            layer.bias.assign(tf.random.normal(layer.bias.shape))
    outputs = (q.get_layer(name).output for name in ("v_out", "adv_out"))
    return q, *(keras.Model(q.input, output) for output in outputs)


# --- The network ---


@pytest.mark.parametrize("actions", [2, 3, 6])
def test_difference_1_the_mean_of_q_is_v_in_each_state(actions):
    q, v, adv = (model(STATES).numpy() for model in network(actions))
    assert (q.shape, v.shape, adv.shape) == ((32, actions), (32, 1), (32, actions))
    np.testing.assert_allclose(q.mean(axis=1), v[:, 0], atol=1e-5)
    np.testing.assert_allclose(q, v + adv - adv.mean(axis=1, keepdims=True), atol=1e-5)
    assert np.ptp(adv.mean(axis=1)) > 0.1  # or the batch's mean would do as well
    assert (q.argmax(1) == adv.argmax(1)).all()


def test_difference_1_a_state_has_its_q_values_in_any_company():
    q, _, _ = network()
    alone = np.concatenate([q(state[np.newaxis]).numpy() for state in STATES])
    np.testing.assert_allclose(q(STATES), alone, atol=1e-5)


def test_a_constant_added_to_the_advantages_changes_nothing():
    q, _, adv = network()
    before, adv_before = q(STATES).numpy(), adv(STATES).numpy()
    q.get_layer("adv_out").bias.assign_add([7.0, 7.0])
    np.testing.assert_allclose(adv(STATES), adv_before + 7, atol=1e-5)
    np.testing.assert_allclose(q(STATES), before, atol=1e-5)
    q.get_layer("v_out").bias.assign_add([7.0])
    np.testing.assert_allclose(q(STATES), before + 7, atol=1e-5)


def test_networks_are_the_articles():
    trunk = 4 * 30 + 30 + 30 * 30 + 30
    stream = 30 * 30 + 30
    double, dueling = (script.DQModel(30, 2, dueling) for dueling in (False, True))
    assert double.count_params() == trunk + stream + 30 * 2 + 2
    assert dueling.count_params() == double.count_params() + stream + 30 + 1
    for model in (double, dueling):
        layers = [layer for layer in model.layers if layer.weights]
        assert {type(layer.kernel_initializer).__name__ for layer in layers} == {"HeNormal"}
        linear = {layer.name for layer in layers if layer.activation.__name__ == "linear"}
        assert linear == {"adv_out", "v_out"} & {layer.name for layer in layers}


def test_difference_7_a_saved_network_needs_no_code(tmp_path):
    network()[0].save(tmp_path / "dueling.keras")
    with zipfile.ZipFile(tmp_path / "dueling.keras") as archive:
        config = archive.read("config.json").decode()
    assert '"Mean"' in config
    assert "Lambda" not in config
    assert "dueling_q_cartpole" not in config


def numpy_forward(x, model):
    """Return Q (batch, 2) of states (batch, 4), the hidden layers' outputs, and the weights."""
    layers = [layer for layer in model.layers if layer.weights]
    weights = {layer.name: [w.astype("float64") for w in layer.get_weights()] for layer in layers}
    h1 = np.maximum(x @ weights["dense1"][0] + weights["dense1"][1], 0)
    h2 = np.maximum(h1 @ weights["dense2"][0] + weights["dense2"][1], 0)
    ha = np.maximum(h2 @ weights["adv_dense"][0] + weights["adv_dense"][1], 0)
    hv = np.maximum(h2 @ weights["v_dense"][0] + weights["v_dense"][1], 0)
    adv = ha @ weights["adv_out"][0] + weights["adv_out"][1]
    v = hv @ weights["v_out"][0] + weights["v_out"][1]
    return v + adv - adv.mean(axis=1, keepdims=True), (x, h1, h2, ha, hv), weights


def numpy_gradients(dq, hidden, weights):
    """Return {layer: (of its kernel, of its bias)} for dq, the loss's gradient by Q."""
    x, h1, h2, ha, hv = hidden
    d_adv = dq - dq.mean(axis=1, keepdims=True)
    d_v = dq.sum(axis=1, keepdims=True)
    d_ha = (d_adv @ weights["adv_out"][0].T) * (ha > 0)
    d_hv = (d_v @ weights["v_out"][0].T) * (hv > 0)
    d_h2 = d_ha @ weights["adv_dense"][0].T + d_hv @ weights["v_dense"][0].T
    d_h2 = d_h2 * (h2 > 0)
    d_h1 = (d_h2 @ weights["dense2"][0].T) * (h1 > 0)
    pairs = {
        "dense1": (x, d_h1),
        "dense2": (h1, d_h2),
        "adv_dense": (h2, d_ha),
        "v_dense": (h2, d_hv),
        "adv_out": (ha, d_adv),
        "v_out": (hv, d_v),
    }
    return {name: (inputs.T @ delta, delta.sum(0)) for name, (inputs, delta) in pairs.items()}


def test_a_training_step_equals_numpy():
    (primary, *_), (target, *_), batch = network(seed=1), network(seed=2), random_batch()
    states, actions, rewards, next_states, terminals = batch
    q, hidden, weights = numpy_forward(states, primary)
    q_chooser, q_judge = (numpy_forward(next_states, model)[0] for model in (primary, target))
    errors = np.zeros((32, 2))
    for i in range(32):
        future = 0 if terminals[i] else 0.95 * q_judge[i, q_chooser[i].argmax()]
        errors[i, actions[i]] = q[i, actions[i]] - (rewards[i] + future)
    gradients = numpy_gradients(2 * errors / q.size, hidden, weights)

    loss, mean_q, moves = step_of_descent(script.train, batch, primary, target, 0.95)
    assert loss == pytest.approx(np.mean(errors**2), rel=1e-5)
    assert mean_q == pytest.approx(np.mean(np.max(q_judge, axis=1)), rel=1e-5)
    moves = dict(zip([weight.path for weight in primary.weights], moves, strict=True))
    for name, (kernel, bias) in gradients.items():
        np.testing.assert_allclose(moves[f"{name}/kernel"], kernel, atol=1e-5)
        np.testing.assert_allclose(moves[f"{name}/bias"], bias, atol=1e-5)


def test_difference_7_the_compiled_agent_trains_and_follows():
    """It does what `train` and `update_network` do uncompiled, with the article's Adam."""
    primary, target, primary_copy, target_copy = (network(seed=seed)[0] for seed in (1, 2, 1, 2))
    args = types.SimpleNamespace(gamma=0.95, tau=0.08)
    learn, q_values = script.compile_agent(primary, target, args)
    adam = keras.optimizers.Adam(0.001)
    adam.build(primary_copy.trainable_variables)
    for step in range(3):
        batch = random_batch(step)
        results = learn(*map(tf.constant, batch))
        expected = script.train(batch, primary_copy, target_copy, adam, 0.95)
        np.testing.assert_allclose(results, expected, rtol=1e-4)
        script.update_network(primary_copy, target_copy, 0.08)
    for model, copy in ((primary, primary_copy), (target, target_copy)):
        np.testing.assert_allclose(model(STATES), copy(STATES), atol=1e-4)
    np.testing.assert_allclose(q_values(STATES[:1]), primary(STATES[:1]), atol=1e-5)


def test_example_by_hand(capsys):
    script.show_dueling_example()
    guess, best = capsys.readouterr().out.splitlines()
    for line, v, a in ((guess, 53.33, [-43.33, -3.33, 46.67]), (best, 100, [-90, -50, 0])):
        assert [float(x) for x in re.findall(r"-?\d+\.\d*", line)] == [10, 50, 100, v, *a]


# --- Training, and differences from the article ---


def test_difference_2_the_target_network_starts_as_a_copy_and_all_move(monkeypatch):
    agents, compile_agent = [], script.compile_agent

    def watched(primary, target, args):
        agents.append((primary, target, primary.get_weights(), target.get_weights()))
        return compile_agent(primary, target, args)

    monkeypatch.setattr(script, "compile_agent", watched)
    script.main(["--epochs", "25", "--delay-training", "150", "--epsilon-min-iter", "200"])
    for primary, target, *starts in agents:
        assert target is not primary
        for one, two in zip(*starts, strict=True):
            np.testing.assert_array_equal(one, two)
        for model in (primary, target):
            moved = [np.abs(a - b).max() for a, b in zip(model.get_weights(), starts[0])]
            assert min(moved) > 1e-4
    assert [len(agent[2]) for agent in agents] == [8, 12]  # Double Q, Dueling Q
    for i in range(4):  # the trunk is the same in both arms
        np.testing.assert_array_equal(agents[0][2][i], agents[1][2][i])


FLAGS = ["--delay-training", "150", "--epsilon-min-iter", "200"]


@pytest.mark.parametrize(
    ("level", "first"),
    [
        (0.9999, 151),  # the action after step 151 is the first that may be greedy
        (0.5, 252),  # halfway: (252 - 150) / 200 * 0.99 = 0.505
        (0.0101, 350),  # the end; the article's jumps down at 200
    ],
)
def test_difference_3_epsilon_falls_without_a_jump(monkeypatch, level, first):
    env = Scripted(600)
    monkeypatch.setattr(script.random, "random", lambda: level)  # random while epsilon is above it
    monkeypatch.setattr(script.random, "randrange", lambda actions: -1)
    train_scripted(script, monkeypatch, env, "--epochs", "1", *FLAGS)
    assert env.actions[:600] == [-1] * first + [1] * (600 - first)


def test_difference_4_untrained_steps_are_not_averaged(monkeypatch):
    # The 151st step is the first that trains.
    env = Scripted(140, 10, 4, 2)
    record, _ = train_scripted(script, monkeypatch, env, "--epochs", "4", *FLAGS)
    assert record["history"] == {
        "reward": [140, 10, 4, 2],
        "avg loss": [None, None, (1 + 2 + 3 + 4) / 4, (5 + 6) / 2],
        "mean q": [None, None, (10 + 20 + 30 + 40) / 4, (50 + 60) / 2],
    }


@pytest.mark.parametrize("falls", [True, False])
def test_difference_5_only_a_fall_is_a_terminal(monkeypatch, falls):
    env = Scripted(5, 4, 6, falls=falls)
    _, memory = train_scripted(script, monkeypatch, env, "--epochs", "3")
    assert (memory.added, memory.max_memory) == (15, 500000)
    assert np.flatnonzero(memory.terminals).tolist() == ([4, 8, 14] if falls else [])


@pytest.mark.slow
def test_claim_both_reach_180_and_neither_is_clearly_ahead():
    """Within 500 episodes, in three runs out of three; the means differ by less than the spread."""
    script.main(["--runs", "3"])
    (path,) = pathlib.Path("log").glob("*/*/results.json")
    reached = [
        [run["final"]["episodes_to_180"] for run in record["runs"]]
        for record in json.loads(path.read_text())["arms"].values()
    ]
    assert max(map(max, reached)) <= 500
    means, spreads = map(statistics.mean, reached), map(statistics.stdev, reached)
    assert abs(np.diff([*means])[0]) < 2 * max(spreads)
