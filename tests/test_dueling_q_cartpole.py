"""dueling_q_cartpole.py's own network and differences; test_double_q_cartpole.py tests the rest."""

import inspect
import re
import statistics

import helpers
import numpy as np
import oracles
import pytest
import tensorflow as tf

import double_q_cartpole
import dueling_q_cartpole as script

keras = script.keras

STATES = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
SAME = ["Memory", "split_rows", "choose_action", "update_network"]


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


def chains(model):
    """Return the weights on the way to the advantages, and those on the way to the value."""
    weights = {layer.name: layer.get_weights() for layer in model.layers}
    trunk = weights["dense1"] + weights["dense2"]
    return [trunk + weights[f"{name}_dense"] + weights[f"{name}_out"] for name in ("adv", "v")]


def numpy_q(states, model):
    adv, v = (oracles.mlp(states, chain)[-1] for chain in chains(model))
    return v + adv - adv.mean(axis=1, keepdims=True)


def test_a_training_step_equals_numpy():
    (primary, *_), (target, *_), batch = network(seed=1), network(seed=2), oracles.random_batch()
    states, _, _, next_states, _ = batch
    q, q_chooser = numpy_q(states, primary), numpy_q(next_states, primary)
    q_judge = numpy_q(next_states, target)
    errors = q - oracles.target_q(batch, q, q_chooser, q_judge)
    dq = 2 * errors / q.size
    deltas = dq - dq.mean(axis=1, keepdims=True), dq.sum(axis=1, keepdims=True)
    adv, v = (
        oracles.mlp_gradients(oracles.mlp(states, chain), chain, delta)
        for chain, delta in zip(chains(primary), deltas)
    )
    expected = [sum(pair) for pair in zip(adv[:4], v[:4])] + adv[4:] + v[4:]
    layers = ["dense1", "dense2", "adv_dense", "adv_out", "v_dense", "v_out"]
    paths = [f"{layer}/{kind}" for layer in layers for kind in ("kernel", "bias")]

    loss, gradient = oracles.gradient_of(
        primary, lambda sgd: script.train(batch, primary, target, sgd, 0.95)
    )
    assert float(loss) == pytest.approx(np.mean(errors**2), rel=1e-5)
    gradient = dict(zip([weight.path for weight in primary.weights], gradient, strict=True))
    oracles.assert_same([gradient[path] for path in paths], expected, atol=1e-5)


def test_difference_7_the_compiled_agent_trains_and_follows():
    networks, copies = ([network(seed=seed)[0] for seed in (1, 2)] for _ in range(2))
    oracles.check_compiled_agent(script, networks, copies)


def test_example_by_hand(capsys):
    script.show_dueling_example()
    guess, best = capsys.readouterr().out.splitlines()
    for line, v, a in ((guess, 53.33, [-43.33, -3.33, 46.67]), (best, 100, [-90, -50, 0])):
        assert [float(x) for x in re.findall(r"-?\d+\.\d*", line)] == [10, 50, 100, v, *a]


# --- Training, and differences from the article ---

FLAGS = ["--delay-training", "150", "--epsilon-min-iter", "200"]


def test_difference_2_the_target_network_starts_as_a_copy_and_all_move(monkeypatch):
    agents = oracles.watch_networks(script, monkeypatch, ["--epochs", "25", *FLAGS])
    for networks, starts in agents:
        oracles.assert_same(*starts)  # of the primary and the target network
        assert networks[0] is not networks[1]
        for model in networks:
            assert oracles.smallest_move(model.get_weights(), starts[0]) > 1e-4
    (double, _), (dueling, _) = (starts for _, starts in agents)
    assert (len(double), len(dueling)) == (8, 12)
    oracles.assert_same(double[:4], dueling[:4])  # the trunk is the same in both arms


@pytest.mark.parametrize(
    ("level", "first"),
    [
        (0.9999, 151),  # the action after step 151 is the first that may be greedy
        (0.5, 252),  # halfway: (252 - 150) / 200 * 0.99 = 0.505
        (0.0101, 350),  # the end; the article's jumps down at 200
    ],
)
def test_difference_3_epsilon_falls_without_a_jump(monkeypatch, level, first):
    at_random = oracles.random_actions(script, monkeypatch, level, 600, *FLAGS)
    assert at_random == [True] * first + [False] * (600 - first)


def test_difference_4_untrained_steps_are_not_averaged(monkeypatch):
    oracles.check_means(script, monkeypatch, 151, *FLAGS)


@pytest.mark.parametrize(("falls", "flags", "terminals"), oracles.ENDINGS)
def test_difference_5_only_a_fall_is_a_terminal(monkeypatch, falls, flags, terminals):
    memory = oracles.check_memory(script, monkeypatch, falls, flags, terminals)
    assert memory.max_memory == 500000


@pytest.mark.slow
def test_claim_both_learn_and_neither_is_clearly_ahead():
    """Four of five runs of each pass a mean of 180; the arms differ by less than the spread."""
    _, arms = helpers.run_main(script, ["--epochs", "300", "--runs", "5"])
    late = []
    for record in arms.values():
        assert sum(run["final"]["episodes_to_180"] <= 300 for run in record["runs"]) >= 4
        late.append([statistics.mean(run["history"]["reward"][100:]) for run in record["runs"]])
    double, dueling = map(statistics.mean, late)
    assert abs(double - dueling) < max(map(statistics.stdev, late))
