"""resnet_cifar10.py: blocks and pipeline by hand, its differences from the article, resuming."""

import json
import signal
import subprocess

import helpers
import numpy as np
import pytest
import tensorflow as tf
from helpers import Case, start

import resnet_cifar10 as script

keras = script.keras

HISTORY = ["acc", "loss", "val_acc", "val_loss"]
FITS = {"scalars": {"epoch_acc", "epoch_loss"}}
CASE = Case(
    tiny=["--synthetic", "--epochs", "2", "--steps-per-epoch", "4"],
    final_epochs={"resnet": 2, "plain": 2},
    history={"resnet": HISTORY, "plain": HISTORY},
    events={
        f"{arm}/{part}": kinds
        for arm in ("resnet", "plain")
        for part, kinds in {"train": FITS, "validation": FITS, "": {"images": {"kernels"}}}.items()
    },
    figures=["training_accuracy.png", "validation_accuracy.png"],
    started="1/195",
    again="Epoch 2/",
    bad_flags=[
        ["--steps-per-epoch", "0"],
        ["--batch-size", "0"],
        ["--arms"],
        ["--arms", "resnet", "vgg"],
        ["--resume", "no/such/run"],
    ],
)


def numbered(count):
    """Return images whose every pixel is their number, and the numbers as labels."""
    numbers = np.arange(count, dtype="uint8")
    return np.broadcast_to(numbers[:, None, None, None], (count, 32, 32, 3)), numbers[:, None]


def batches(dataset, count):
    return [labels.numpy().ravel().tolist() for _, labels in dataset.take(count)]


def test_difference_1_images_are_shuffled_not_batches():
    train_dataset, _ = script.make_datasets((numbered(64), numbered(8)), 8, seed=0)
    found = batches(train_dataset, 16)
    first, second = found[:8], found[8:]
    for one_pass in (first, second):  # each pass has each image once
        assert sorted(sum(one_pass, [])) == list(range(64))
    companions = [{frozenset(batch) for batch in one_pass} for one_pass in (first, second)]
    assert not companions[0] & companions[1]  # batch().shuffle() keeps all eight


def test_the_seed_decides_the_batches():
    data = (numbered(64), numbered(8))
    found = []
    for seed in (0, 0, 1):
        keras.utils.set_random_seed(seed)
        found.append(batches(script.make_datasets(data, 8, seed)[0], 8))
    assert found[0] == found[1] != found[2]


def test_difference_2_batches_are_prepared_whole_and_ahead(monkeypatch):
    ranks, crop = [], tf.image.central_crop
    monkeypatch.setattr(
        tf.image, "central_crop", lambda x, n: ranks.append(x.shape.rank) or crop(x, n)
    )
    for dataset in script.make_datasets((numbered(64), numbered(8)), 8, seed=0):
        assert "Prefetch" in type(dataset).__name__
    assert set(ranks) == {4}


def test_difference_3_validation_sees_each_image_once():
    images, labels = np.zeros((2500, 32, 32, 3), "uint8"), np.arange(2500)[:, None]
    _, valid_dataset = script.make_datasets((numbered(8), (images, labels)), 8, seed=0)
    assert sum(batches(valid_dataset, -1), []) == list(range(2500))


def test_crop_scale_and_flip_by_hand():
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype="uint8")
    labels = np.arange(64)[:, None]
    train_dataset, valid_dataset = script.make_datasets(((images, labels),) * 2, 64, seed=0)
    cropped = images[:, 4:28, 4:28].astype("float32") / 255
    batch, _ = next(iter(valid_dataset))
    assert batch.dtype == tf.float32
    np.testing.assert_allclose(batch, cropped, rtol=1e-6)
    batch, numbers = next(iter(train_dataset))
    expected = cropped[numbers.numpy().ravel()]
    kept = np.isclose(batch, expected).all((1, 2, 3))
    mirrored = np.isclose(batch, expected[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 15 < mirrored.sum() < 49  # each image by its own draw


def silent_convolutions(block):
    """Return the block's output for x, with its convolutions set to give zero."""
    inputs = keras.Input((6, 6, 64))
    model = keras.Model(inputs, block(inputs, 64, 3))
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            layer.kernel.assign(tf.zeros_like(layer.kernel))
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 64)).astype("float32")
    return x, model(x).numpy()


def test_a_silent_residual_block_passes_its_input_on():
    x, output = silent_convolutions(script.res_net_block)
    np.testing.assert_allclose(output, np.maximum(x, 0))
    _, output = silent_convolutions(script.non_res_block)
    assert not output.any()


def test_networks_are_the_articles():
    models = {arm: script.build_model(arm) for arm in ("resnet", "plain")}
    # Worked out by hand: convolutions, batch norms with four numbers a filter, dense layers
    blocks = 20 * (9 * 64 * 64 + 64 + 4 * 64)
    ends = (27 * 32 + 32) + (9 * 32 * 64 + 64) + (9 * 64 * 64 + 64) + (64 * 256 + 256) + 2570
    for model in models.values():
        assert model.input_shape == (None, 24, 24, 3)
        assert model.output_shape == (None, 10)
        assert model.count_params() == blocks + ends
    kinds = [type(layer).__name__ for layer in models["resnet"].layers]
    assert kinds.count("Add") == 10
    assert "Add" not in [type(layer).__name__ for layer in models["plain"].layers]


def test_difference_4_kernels_are_written_as_images(smoke_run):
    from tensorboard.backend.event_processing import event_accumulator

    folder = smoke_run("resnet_cifar10").folder / "plain"
    accumulator = event_accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    events = accumulator.Tensors("kernels")
    assert [event.step for event in events] == [0, 1]
    width, height, *pictures = tf.make_ndarray(events[0].tensor_proto).tolist()
    assert (width, height, len(pictures)) == (b"3", b"3", 32)


def test_difference_5_both_arms_start_alike(smoke_run):
    weights = []
    for arm in ("resnet", "plain"):
        keras.utils.set_random_seed(0)
        weights.append(script.build_model(arm).get_weights())
    assert all(np.array_equal(one, other) for one, other in zip(*weights, strict=True))
    saved = keras.models.load_model(smoke_run("resnet_cifar10").folder / "plain.keras")
    moved = [np.abs(a - b).max() for a, b in zip(saved.get_weights(), weights[1])]
    assert np.mean(np.array(moved) > 1e-5) > 0.9


def test_one_arm_alone_gives_what_it_gives_among_both(smoke_run, run_fork, tmp_path):
    among_both = smoke_run("resnet_cifar10").results["arms"]["plain"]["history"]
    run = run_fork("resnet_cifar10", [*CASE.tiny, "--arms", "plain"], tmp_path)
    assert list(run.results["arms"]) == ["plain"]
    for metric, values in run.results["arms"]["plain"]["history"].items():
        assert values == pytest.approx(among_both[metric], rel=1e-3), metric


def test_synthetic_classes_can_be_learned():
    (x, y), (x_test, y_test) = script.load_data(synthetic=True)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((2000, 32, 32, 3), "uint8", (2000, 1), "uint8")
    means = np.stack([x[y[:, 0] == label].mean(0) for label in range(10)])
    nearest = [np.square(image - means).sum((1, 2, 3)).argmin() for image in x_test]
    assert np.mean(np.array(nearest) == y_test[:, 0]) > 0.9


# --- Resuming ---

# For each line of flags a life, forked so that TensorFlow is imported once. One block keeps its
# start short; a kill strikes where `strike` is called for the Nth time.
VICTIM = """
import json, os, signal, sys
import resnet_cifar10 as script
from tensorflow.python.checkpoint import checkpoint_management
script.NUM_RES_NET_BLOCKS = 1

def live(where, count, *flags):
    def strike(owner, name, after=False):
        original, calls = getattr(owner, name), []
        def struck(*args, **kwargs):
            calls.append(1)
            if len(calls) == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            value = original(*args, **kwargs)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return value
        setattr(owner, name, struck)
    if where == "before results": strike(script, "write_results")
    if where == "results half written": strike(script.os, "replace")
    if where == "before checkpoint": strike(script.tf.train.CheckpointManager, "save")
    if where == "checkpoint half written":
        strike(checkpoint_management, "update_checkpoint_state_internal")
    if where == "after checkpoint": strike(script.tf.train.CheckpointManager, "save", after=True)
    if where == "before model": strike(script.keras.Model, "save")
    if where == "before figures": strike(script, "plot")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    script.main(flags)

for line in sys.stdin:
    child = os.fork()
    if not child:
        live(*json.loads(line))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KILLS = [
    ("before results", 3),  # the second epoch of the first arm
    ("results half written", 2),  # its third
    ("checkpoint half written", 1),  # the third epoch again
    ("before model", 1),
    ("before checkpoint", 2),  # the second epoch of the second arm
    ("after checkpoint", 1),
    ("before figures", 1),
]


def check_history(results, epochs):
    for arm in ("resnet", "plain"):
        history = results["arms"][arm]["history"]
        assert set(history) == set(HISTORY)
        assert [len(values) for values in history.values()] == [epochs] * 4
        assert all(np.isfinite(values).all() for values in history.values())


@pytest.fixture
def live(tmp_path):
    """Return a function (where, count, flags) -> (exit code, run's folder, results) of a life."""
    process = start(["-c", VICTIM], tmp_path, stdin=subprocess.PIPE)

    def live(where, count, flags):
        process.stdin.write(json.dumps([where, count, *flags]) + "\n")
        process.stdin.flush()
        code = process.stdout.readline().strip()
        (path,) = tmp_path.glob("log/*/*/results.json")
        return code, path.parent, json.loads(path.read_text())

    yield live
    process.communicate(timeout=60)


def test_resume_after_kills(live):
    flags = ["--synthetic", "--epochs", "3", "--steps-per-epoch", "4"]
    trail = []
    for where, count in KILLS:
        code, run_dir, results = live(where, count, flags)
        assert code == str(-signal.SIGKILL), where
        flags = ["--resume", str(run_dir)]
        trail.append({a: len(r["history"].get("acc", [])) for a, r in results["arms"].items()})
    code, _, results = live("nowhere", 1, flags)
    assert (code, results["complete"]) == ("0", True)
    check_history(results, 3)
    assert trail[0] == {"resnet": 1}
    assert trail[-1] == {"resnet": 3, "plain": 3}
    # what one life wrote, the next ones left alone, but for the epoch they repeated
    assert {path.name for path in run_dir.glob("*.keras")} == {"resnet.keras", "plain.keras"}
    # a finished run trains nothing more, unless it is given more epochs
    before = results["arms"]
    code, _, results = live("nowhere", 1, flags)
    assert (code, results["arms"]) == ("0", before)
    code, _, results = live("nowhere", 1, [*flags, "--epochs", "4"])
    check_history(results, 4)
    for arm in ("resnet", "plain"):
        assert results["arms"][arm]["history"]["acc"][:3] == before[arm]["history"]["acc"]


def test_resume_continues_exactly(monkeypatch):
    """Weights, moments and step count come back: a restored model takes the same next step."""
    data = script.load_data(synthetic=True)
    run_dir = script.pathlib.Path("run")
    run_dir.mkdir()
    batch = next(iter(script.make_datasets(data, 64, 0)[0]))

    def compiled():
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [keras.Input((24, 24, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()]
            + [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, "softmax")]
        )
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["acc"])
        return model

    first = compiled()
    recorder = script.Recorder(first, run_dir, {"arms": {}}, "resnet")
    first.fit(*batch, epochs=3, verbose=0, shuffle=False, callbacks=[recorder])
    second = compiled()
    recorder = script.Recorder(second, run_dir, {"arms": {}}, "resnet")
    assert int(recorder.epochs_done) == 3
    assert int(second.optimizer.iterations) == int(first.optimizer.iterations) == 6
    for model in (first, second):
        model.train_on_batch(*batch)
    for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["data-00000-of-00001", "index"])
def test_damaged_checkpoint(smoke_run, tmp_path, capsys, kind):
    code, line = helpers.resume_a_damaged_checkpoint(
        script, smoke_run("resnet_cifar10"), kind, tmp_path, capsys, "checkpoint/resnet"
    )
    assert code == 1
    assert "damaged" in line
    assert "checkpoint/resnet" in line


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_claim_resnet_learns_faster(seed):
    """Ten epochs on the real images: the residual network is ahead in training accuracy."""
    final = script.main(["--epochs", "10", "--seed", str(seed)])
    assert final["resnet"]["acc"] > final["plain"]["acc"] + 0.02
