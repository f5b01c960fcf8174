"""dueling_q_cartpole.py: the dueling network by hand and in NumPy, and each difference.

What it shares with double_q_cartpole.py, word for word, is tested in test_double_q_cartpole.py.
"""

import re
import statistics
import zipfile

import numpy as np
import pytest
import tensorflow as tf
import watch_q
from helpers import Case

import dueling_q_cartpole as script

keras = script.keras

ARMS = ["double", "dueling"]
CASE = Case(
    tiny=["--epochs", "25", "--delay-training", "150", "--epsilon-min-iter", "200"],
    final_epochs=dict.fromkeys(ARMS, 25),
    history=dict.fromkeys(ARMS, ["reward", "avg loss"]),
    events=dict.fromkeys(ARMS, {"scalars": {"reward", "avg loss"}}),
    figures=["reward.png"],
    started="/500",  # the bar
    again="episode 50:",
    bad_flags=[
        ["--episodes", "0"],
        ["--max-steps", "0"],
        ["--random-reward-std", "1e9"],
        ["--delay-training", "31"],  # no batch could be drawn
        ["--epsilon-min-iter", "0"],
        ["--gamma", "-0.1"],
        ["--tau", "1.1"],
        ["--runs", "0"],
        ["--arms", "dqn"],
        ["--device", "all"],
    ],
)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Return a tiny run of both arms, watched."""
    with pytest.MonkeyPatch.context() as patch:
        return watch_q.Watched(script, CASE.tiny, tmp_path_factory.mktemp("watched"), patch)


def network(actions=2, seed=0):
    """Return a dueling network and its parts: Q, V and A (each a model of states)."""
    keras.utils.set_random_seed(seed)
    q = script.DQModel(30, actions, dueling=True)
    for layer in q.layers:  # biases start at zero, and would hide their part
        if layer.weights:
            layer.bias.assign(tf.random.normal(layer.bias.shape))
    outputs = (q.get_layer(name).output for name in ("v_out", "adv_out"))
    return q, *(keras.Model(q.input, output) for output in outputs)


STATES = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")


# --- The network ---


@pytest.mark.parametrize("actions", [2, 3, 6])
def test_difference_1_the_mean_of_q_is_v_in_each_state(actions):
    q, v, adv = (model(STATES).numpy() for model in network(actions))
    assert (q.shape, v.shape, adv.shape) == ((32, actions), (32, 1), (32, actions))
    np.testing.assert_allclose(q.mean(axis=1), v[:, 0], atol=1e-5)
    np.testing.assert_allclose(q, v + adv - adv.mean(axis=1, keepdims=True), atol=1e-5)
    assert np.ptp(adv.mean(axis=1)) > 0.1  # or the batch's mean would do as well


def test_difference_1_a_state_has_its_q_values_in_any_company():
    q, _, _ = network()
    alone = np.concatenate([q(state[np.newaxis]).numpy() for state in STATES])
    np.testing.assert_allclose(q(STATES), alone, atol=1e-5)


def test_a_constant_added_to_the_advantages_changes_nothing():
    q, v, adv = network()
    before, v_before, adv_before = q(STATES).numpy(), v(STATES).numpy(), adv(STATES).numpy()
    q.get_layer("adv_out").bias.assign_add([7.0, 7.0])
    np.testing.assert_allclose(adv(STATES), adv_before + 7, atol=1e-5)
    np.testing.assert_allclose(q(STATES), before, atol=1e-5)
    q.get_layer("v_out").bias.assign_add([7.0])
    np.testing.assert_allclose(q(STATES), before + 7, atol=1e-5)
    np.testing.assert_allclose(v(STATES), v_before + 7, atol=1e-5)


def test_the_best_action_is_that_of_the_advantages():
    q, _, adv = (model(STATES).numpy() for model in network(5))
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


def test_a_saved_network_needs_no_code(smoke_run):
    path = smoke_run("dueling_q_cartpole").folder / "dueling.keras"
    with zipfile.ZipFile(path) as archive:
        config = archive.read("config.json").decode()
    assert "Lambda" not in config
    assert "dueling_q_cartpole" not in config
    assert '"Mean"' in config  # test_smoke.py loads it in a fresh process


def numpy_forward(x, weights):
    """Return Q (batch, 2) of states (batch, 4) and what the backward pass needs."""
    h1 = np.maximum(x @ weights["dense1"][0] + weights["dense1"][1], 0)
    h2 = np.maximum(h1 @ weights["dense2"][0] + weights["dense2"][1], 0)
    ha = np.maximum(h2 @ weights["adv_dense"][0] + weights["adv_dense"][1], 0)
    hv = np.maximum(h2 @ weights["v_dense"][0] + weights["v_dense"][1], 0)
    adv = ha @ weights["adv_out"][0] + weights["adv_out"][1]
    v = hv @ weights["v_out"][0] + weights["v_out"][1]
    return v + adv - adv.mean(axis=1, keepdims=True), (x, h1, h2, ha, hv)


def numpy_gradients(dq, weights, hidden):
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


def weights_of(model):
    """Return {layer: [kernel, bias]} in float64."""
    layers = [layer for layer in model.layers if layer.weights]
    return {layer.name: [w.astype("float64") for w in layer.get_weights()] for layer in layers}


def test_training_steps_equal_numpy():
    primary, target = network(seed=1)[0], network(seed=2)[0]
    optimizer = keras.optimizers.Adam()
    optimizer.build(primary.trainable_variables)
    learn = script.compile_for_shape(
        lambda batch: script.q_learning_step(batch, primary, target, optimizer, 0.95, 0.08),
        (32, 11),
    )
    weights, followers = weights_of(primary), weights_of(target)
    moments = {name: [(0, 0)] * 2 for name in weights}
    rng = np.random.default_rng(0)
    for step in range(1, 6):
        batch = watch_q.make_batch(rng)
        loss = learn(tf.constant(batch))
        rows = batch.astype("float64")
        q, hidden = numpy_forward(rows[:, :4], weights)
        nexts = (numpy_forward(rows[:, 6:10], w)[0] for w in (weights, followers))
        goals = watch_q.numpy_targets(rows, *nexts, 0.95)
        errors = np.zeros_like(q)
        taken = np.arange(32), rows[:, 4].astype(int)
        errors[taken] = q[taken] - goals
        assert float(loss) == pytest.approx(np.mean(errors**2), rel=1e-4)
        gradients = numpy_gradients(2 * errors / q.size, weights, hidden)
        for name in weights:
            weights[name], moments[name] = watch_q.numpy_adam(
                weights[name], gradients[name], moments[name], step
            )
            pairs = zip(followers[name], weights[name])
            followers[name] = [t * (1 - 0.08) + e * 0.08 for t, e in pairs]
        for model, expected in ((primary, weights), (target, followers)):
            for name, values in weights_of(model).items():
                for value, expectation in zip(values, expected[name], strict=True):
                    np.testing.assert_allclose(value, expectation, atol=1e-4)


def test_example_by_hand(capsys):
    script.show_dueling_example()
    line = capsys.readouterr().out
    assert [float(x) for x in re.findall(r"-?\d+\.\d*", line)] == [
        *(10, 50, 100, 53.33),
        *(-43.33, -3.33, 46.67),
    ]


# --- Differences from the article ---


def test_difference_2_the_target_network_starts_as_a_copy(watched):
    assert len(watched.traces) == 2
    starts = []
    for primary, target, primary_start, target_start, _ in watched.traces:
        assert target is not primary
        for one, two in zip(primary_start, target_start, strict=True):
            np.testing.assert_array_equal(one, two)
        for model in (primary, target):
            moved = [np.abs(a - b).max() for a, b in zip(model.get_weights(), primary_start)]
            assert min(moved) > 1e-4
        starts.append(primary_start)
    for one, two in zip(*starts):  # what both arms have starts alike: the trunk
        if one.shape[0] != two.shape[0] or one.shape == (30, 2):
            break
        np.testing.assert_array_equal(one, two)


def test_difference_3_epsilon_falls_without_a_jump(watched):
    steps = [memory.added for memory in watched.memories]
    assert len(watched.eps) == sum(steps)
    for eps in (watched.eps[: steps[0]], watched.eps[steps[0] :]):
        assert eps[:151] == [1.0] * 151
        assert eps[250] == pytest.approx(1 - 0.99 / 2)
        assert eps[350] == pytest.approx(0.01)
        assert set(eps[351:]) == {eps[350]}
        assert -np.diff(eps[150:351]) == pytest.approx([0.99 / 200] * 200)


def test_difference_4_untrained_steps_are_not_averaged(watched):
    losses = iter(watched.losses)
    for record in watched.results["arms"].values():
        history, done = record["history"], 0
        for length, avg_loss in zip(history["reward"], history["avg loss"]):
            trained = [next(losses) for step in range(done + 1, done + length + 1) if step > 150]
            assert avg_loss == (pytest.approx(statistics.mean(trained)) if trained else None)
            done += length
        assert history["avg loss"].count(None) > 1
        assert min(loss for loss in history["avg loss"] if loss is not None) > 0
    assert next(losses, None) is None


def test_difference_5_the_time_limit_is_no_terminal(monkeypatch):
    watch_q.limit_steps(script, monkeypatch, 5)
    run = watch_q.Watched(script, ["--epochs", "3", "--arms", "dueling"], "log", monkeypatch)
    assert run.memories[0].added == 15
    assert not run.memories[0].rows[:, 10].any()


def test_differences_6_and_7_an_array_and_one_trace(watched):
    assert {memory.rows.shape for memory in watched.memories} == {(500000, 11)}
    assert [eager for *_, eager in watched.traces] == [False, False]
    assert len(watched.losses) > 300


def test_difference_8_it_ends():
    assert script.build_parser().get_default("epochs") == 500


def test_the_seed_and_one_arm_alone(watched):
    _, results, _ = watch_q.run(script, [*CASE.tiny, "--arms", "dueling"])
    history = results["arms"]["dueling"]["history"]
    assert history == watched.results["arms"]["dueling"]["history"]


@pytest.mark.slow
def test_claim_both_reach_180_and_neither_is_clearly_ahead():
    """Within 500 episodes, in three runs out of three; the means differ by less than the spread."""
    _, results, _ = watch_q.run(script, ["--runs", "3"])
    reached = [
        [run["final"]["episodes_to_180"] for run in record["runs"]]
        for record in results["arms"].values()
    ]
    assert max(map(max, reached)) <= 500
    means, spreads = map(statistics.mean, reached), map(statistics.stdev, reached)
    assert abs(np.diff([*means])[0]) < 2 * max(spreads)
