"""Train a ResNet and its plain twin on CIFAR-10, to see what the identity paths are worth.

Article: "Introduction to ResNet in TensorFlow 2" (Adventures in Machine Learning).

Deep stacks of convolutions get worse with depth, in training too: they cannot even learn to pass
their input on. A residual block adds its input to its output, so that it only has to learn the
difference. Ten such blocks, and ten without the addition, are trained in the same way.

    python resnet_cifar10.py                          # both networks, 30 epochs each
    python resnet_cifar10.py --epochs 1 --synthetic   # a look, without a download

Measured, seeds 0 to 2: training accuracy 0.742 +- 0.008, plain 0.685 +- 0.011: the article's lead
of five points holds. Validation 0.673 +- 0.040, plain 0.648 +- 0.008: near 0.1 at first, as batch
norm's averages lag, it still swings by 0.05 from epoch to epoch at last; seed 2 ends in a dip.

Differences from the article:
1. Images are shuffled, then batched: `batch().shuffle()` kept the same 64 together for ever.
2. Batches are prepared whole, and ahead of the training (`prefetch`).
3. Validation counts each test image once: three batches of 5,000 out of 10,000 repeated some.
4. Keras 3 writes no images for `write_images`; here the first convolution's kernels are images.
5. Both networks start from one seed, and each has its own folder of events.
Kept: an epoch is 195 of the 781 batches that make a pass; the test images serve as validation data.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3",
#     "numpy>=2,<3", "matplotlib>=3.9,<4", "tf-keras>=2.20,<3",
# ]
# ///

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

if "TF_CONFIG" in os.environ:  # Keras 3 cannot fit on several machines (keras issue 20585)
    import tf_keras as keras
else:
    import keras

layers = keras.layers

# --- Constants ---

SCRIPT = "resnet_cifar10"
PACKAGES = ("tensorflow", "keras", "numpy")
ARTICLE = {
    "resnet": {"acc": 0.7446, "val_acc": 0.6445},
    "plain": {"acc": 0.6876, "val_acc": 0.6394},
}
NUM_CLASSES = 10
VERBOSE = 1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 2  # a bar, or plain lines
NUM_RES_NET_BLOCKS = 10

# --- Command line ---


def build_parser():
    """Return the parser of this script's flags."""
    style = argparse.ArgumentDefaultsHelpFormatter
    first_line = str(__doc__).partition("\n")[0]
    parser = OneLineParser(description=first_line, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", type=number(int, 0), default=30, help="epochs of each arm")
    add("--device", default="auto", help="auto, cpu, gpu, gpu:N or all")
    add("--logdir", default="log", help="where each run makes a folder of its own")
    add("--seed", type=number(int, 0), default=0, help="seed of all random numbers")
    add("--steps-per-epoch", type=number(int, 1), default=195, help="batches an epoch")
    add("--synthetic", action="store_true", help="use small made-up data: nothing is downloaded")
    add("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    add("--batch-size", type=number(int, 1), default=64, help="images a batch")
    add("--arms", nargs="+", choices=list(ARTICLE), default=list(ARTICLE), help="networks to train")
    return parser


def parse_args(argv):
    """Parse `argv` strictly; None stands for the command line, in a notebook cell for no flags."""
    if argv is None and "__file__" not in globals():
        argv = []  # there sys.argv belongs to the kernel
    return build_parser().parse_args(argv)


# --- Shared helpers: the same text in every script that has them ---


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a bad flag in one line and exits with code 2."""

    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


def number(kind, low, high=2**31 - 1):
    """Return an argparse type: an int or float (`kind`) from `low` to `high`, both included."""

    def number(text):  # argparse takes "invalid number value" from this name
        if not low <= kind(text) <= high:  # nan is refused too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def select_device(device, several=False):
    """Let TensorFlow see only the device of --device ("all" if `several`); return its name."""
    gpus = tf.config.list_physical_devices("GPU")
    choices = {"auto": gpus[:1], "cpu": []} | {f"gpu:{i}": [gpu] for i, gpu in enumerate(gpus)}
    choices |= {"all": gpus} if several else {}
    chosen = choices.get("gpu:0" if device == "gpu" else device)
    if chosen is None:
        build_parser().error(f"argument --device: {device} is not one of {', '.join(choices)} here")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        tf.config.set_visible_devices(chosen, "GPU")
    except RuntimeError:  # TensorFlow has started in this process
        build_parser().error(f"argument --device: too late for {device}; restart Python first")
    return ", ".join(gpu.name.removeprefix("/physical_device:") for gpu in chosen) or "CPU"


def new_run_dir(args, data, device):
    """Make the folder of this run, <logdir>/<script>/<time>; return it and the results so far."""
    name = time.strftime("%Y%m%d-%H%M%S") + ("-synthetic" if data == "synthetic" else "")
    for count in itertools.count():  # two runs may start in the same second
        run_dir = pathlib.Path(args.logdir, SCRIPT, f"{name}-{count}" if count else name)
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir(parents=True)
            break
    results = {"script": SCRIPT, "config": vars(args), "device": device, "data": data, "arms": {}}
    results["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
    results |= {"article": {} if data == "synthetic" else ARTICLE, "complete": False}
    write_results(run_dir, results)
    print(f"{SCRIPT} on {data}, device {device}, writes to {run_dir}")
    return run_dir, results


def write_results(run_dir, results):
    """Replace results.json in one step; keep it, and raise FloatingPointError, for nan or inf."""
    try:
        text = json.dumps(results, indent=1, allow_nan=False)
    except ValueError:
        raise FloatingPointError("the loss is not finite; try another --seed") from None
    temporary = run_dir / "results.json.tmp"
    temporary.write_text(text)
    os.replace(temporary, run_dir / "results.json")


def save_figure(figure, path):
    """Save a figure as PNG; show it too where this runs in a notebook."""
    figure.savefig(path, dpi=100)
    if "inline" in plt.get_backend():
        plt.show()
    plt.close(figure)


def report(run_dir, results):
    """Print the final values beside the article's, the files, and how to see the events."""
    print(f"\n{SCRIPT} on {results['data']}, epochs: {results['config']['epochs']}")
    print(f"{'arm':<16}{'metric':<32}{'here':>12}{'article':>12}{'spread':>12}")
    for arm, record in results["arms"].items():
        final, article = record["final"], results["article"].get(arm, {})
        for metric in final | article:
            values = final.get(metric), article.get(metric), record.get("spread", {}).get(metric)
            cells = ("-" if value is None else f"{round(value, 4):,}" for value in values)
            print("{:<16}{:<32}{:>12}{:>12}{:>12}".format(arm, metric, *cells))
    print(*sorted(map(str, run_dir.glob("*.*"))), f"tensorboard --logdir {run_dir}", sep="\n")


def run_as_command(main):
    """Call `main`; a fault that can be foreseen ends in one line and an exit code."""
    try:
        return main()
    except (KeyboardInterrupt, SystemError):  # C code makes the second of the first
        code, message = 130, "interrupted: what had been finished is in the run's folder"
    except (OSError, FloatingPointError, tf.errors.ResourceExhaustedError) as error:
        reason = str(error).split("}} ")[-1].partition("\n")[0]  # TensorFlow's begin with {{...}}
        ours = not error.args[1:] and not hasattr(error, "op")
        code, message = 1, f"error: {reason}" + ("" if ours else "; see to that path and its disk")
    print(message, file=sys.stderr)
    if "__file__" in globals():  # a notebook's kernel stays usable
        sys.exit(code)


# --- Resuming: the same text in every script that has --resume ---


def resume_run(args, argv):
    """Return (args, run_dir, results) of the run in --resume: only --epochs and --device change."""
    parser, run_dir, results = build_parser(), pathlib.Path(args.resume), {}
    with contextlib.suppress(OSError, ValueError):
        results = json.loads((run_dir / "results.json").read_text())
    if results.get("script") != SCRIPT:
        parser.error(f"argument --resume: {run_dir} holds no run of {SCRIPT}.py that can be read")
    args = parser.parse_args(argv, argparse.Namespace(**results["config"]))
    for name in results["config"].keys() - {"epochs", "device", "resume"}:
        if getattr(args, name) != results["config"][name]:
            parser.error(f"argument --{name.replace('_', '-')}: not as in the run to resume")
    results |= {"config": vars(args), "complete": False}
    old = [f"{p} {v}" for p, v in results["versions"].items() if importlib.metadata.version(p) != v]
    print(f"{SCRIPT} goes on in {run_dir}" + (f"; warning: it was begun with {old}" if old else ""))
    return args, run_dir, results


class Recorder(keras.callbacks.Callback):
    """Restores the last checkpoint; after each epoch writes results.json, then a checkpoint."""

    def __init__(self, model, run_dir, results, arm):
        super().__init__()
        self.run_dir, self.results, self.start = run_dir, results, time.perf_counter()
        self.record = results["arms"].setdefault(arm, {"history": {}, "final": {}, "seconds": 0.0})
        self.epochs_done = tf.Variable(0, dtype=tf.int64)
        model.optimizer.build(model.trainable_variables)  # else its moments have no place yet
        state = {"model": model, "optimizer": model.optimizer, "epochs_done": self.epochs_done}
        folder = str(run_dir / "checkpoint" / arm)
        self.manager = tf.train.CheckpointManager(tf.train.Checkpoint(**state), folder, 1)
        try:
            self.manager.restore_or_initialize()
        except Exception as error:  # half a file raises whatever its bytes lead to
            raise OSError(f"{folder} is damaged; delete it to train {arm} anew") from error

    def on_epoch_end(self, epoch, logs=None):
        now = time.perf_counter()
        self.record["seconds"] += now - self.start
        self.start = now
        for metric, value in logs.items():  # a repeated epoch takes the place of its first try
            self.record["history"].setdefault(metric, [])[epoch:] = [float(value)]
        write_results(self.run_dir, self.results)
        self.epochs_done.assign(epoch + 1)
        self.manager.save()


# --- Data ---


def synthetic_images(count, shape, seed):
    """Make images (count, *shape) and labels (count,), uint8: each class a pattern under noise."""
    patterns = np.random.default_rng(0).uniform(size=(NUM_CLASSES, 4, 4, *shape[2:]))
    patterns = patterns.repeat(shape[0] // 4, axis=1).repeat(shape[1] // 4, axis=2)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, count, dtype="uint8")
    images = 0.5 * patterns[labels] + 0.5 * rng.uniform(size=(count, *shape))
    return (255 * images).astype("uint8"), labels


def load_data(synthetic):
    """Return images (n, 32, 32, 3) and labels (n, 1), to train and to test, or raise OSError."""
    if synthetic:
        sets = (synthetic_images(count, (32, 32, 3), seed=count) for count in (2000, 500))
        return tuple((images, labels[:, np.newaxis]) for images, labels in sets)
    try:
        return keras.datasets.cifar10.load_data()
    except Exception as error:  # Keras raises a plain Exception where a download fails
        reason, name = str(error).partition("\n")[0], "cifar-10-batches-py-target_archive"
        advice = f"empty ~/.keras/datasets, put cifar-10-python.tar.gz there as {name}"
        raise OSError(f"no CIFAR-10 ({reason}); {advice}, or use --synthetic") from None


def make_datasets(data, batch_size, seed):
    """Return the endless training set and the validation set: images (batch, 24, 24, 3) in 0..1."""

    def prepare(images, labels, augment):
        images = tf.cast(tf.image.central_crop(images, 0.75), tf.float32) / 255.0
        return tf.image.random_flip_left_right(images) if augment else images, labels

    train_dataset = tf.data.Dataset.from_tensor_slices(data[0])
    train_dataset = train_dataset.shuffle(len(data[0][0]), seed=seed).repeat().batch(batch_size)
    # One map at a time, ahead of the training: parallel ones would flip differently in each run.
    train_dataset = train_dataset.map(lambda x, y: prepare(x, y, augment=True))
    valid_dataset = tf.data.Dataset.from_tensor_slices(data[1]).batch(1000)
    valid_dataset = valid_dataset.map(lambda x, y: prepare(x, y, augment=False))
    return train_dataset.prefetch(tf.data.AUTOTUNE), valid_dataset.prefetch(tf.data.AUTOTUNE)


# --- Model ---


def res_net_block(input_data, filters, conv_size):
    """Return relu(F(x) + x) of x (batch, h, w, filters), where F is two convolutions."""
    x = layers.Conv2D(filters, conv_size, activation="relu", padding="same")(input_data)
    x = layers.BatchNormalization()(x)
    x = layers.Conv2D(filters, conv_size, activation=None, padding="same")(x)
    x = layers.BatchNormalization()(x)
    x = layers.Add()([x, input_data])  # the identity path: F only learns what to change
    return layers.Activation("relu")(x)


def non_res_block(input_data, filters, conv_size):
    """Return F(x) of x (batch, h, w, filters): the same two convolutions, without the addition."""
    x = layers.Conv2D(filters, conv_size, activation="relu", padding="same")(input_data)
    x = layers.BatchNormalization()(x)
    x = layers.Conv2D(filters, conv_size, activation="relu", padding="same")(x)
    return layers.BatchNormalization()(x)


def build_model(arm):
    """Return the network of the arm "resnet" or "plain": images (24, 24, 3) to 10 probabilities."""
    block = {"resnet": res_net_block, "plain": non_res_block}[arm]
    inputs = keras.Input(shape=(24, 24, 3))
    x = layers.Conv2D(32, 3, activation="relu")(inputs)  # (22, 22, 32)
    x = layers.Conv2D(64, 3, activation="relu")(x)  # (20, 20, 64)
    x = layers.MaxPooling2D(3)(x)  # (6, 6, 64)
    for _ in range(NUM_RES_NET_BLOCKS):
        x = block(x, 64, 3)
    x = layers.Conv2D(64, 3, activation="relu")(x)  # (4, 4, 64)
    x = layers.GlobalAveragePooling2D()(x)  # (64,)
    x = layers.Dense(256, activation="relu")(x)
    x = layers.Dropout(0.5)(x)
    outputs = layers.Dense(NUM_CLASSES, activation="softmax")(x)
    return keras.Model(inputs, outputs, name=arm)


# --- Training ---


def write_kernels(model, epoch):
    """Write the 32 kernels of the first convolution to TensorBoard, as images of 3 x 3 pixels."""
    kernels = tf.transpose(model.layers[1].kernel, (3, 0, 1, 2))  # (32, 3, 3, 3)
    low, high = tf.reduce_min(kernels), tf.reduce_max(kernels)
    tf.summary.image("kernels", (kernels - low) / (high - low), epoch, max_outputs=32)


def make_strategy(device):
    """Return how batches are shared out: over TF_CONFIG's machines, all devices here, or none."""
    if "TF_CONFIG" in os.environ:
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            build_parser().error(f"TF_CONFIG is not as TensorFlow wants it: {error!r}")
    if device == "all":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.get_strategy()


def train(arm, args, data, strategy, run_dir, results):
    """Train one arm to args.epochs, from its checkpoint if it has one, and save <arm>.keras."""
    keras.utils.set_random_seed(args.seed)
    train_dataset, valid_dataset = make_datasets(data, args.batch_size, args.seed)
    with strategy.scope():
        model = build_model(arm)
        model.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy", metrics=["acc"])
        recorder = Recorder(model, run_dir, results, arm)
    images = keras.callbacks.LambdaCallback(on_epoch_end=lambda e, _: write_kernels(model, e))
    with tf.summary.create_file_writer(str(run_dir / arm)).as_default():
        model.fit(
            train_dataset,
            epochs=args.epochs,
            initial_epoch=int(recorder.epochs_done.numpy()),
            steps_per_epoch=args.steps_per_epoch,
            validation_data=valid_dataset,
            shuffle=False,  # the dataset has done it
            verbose=VERBOSE,
            callbacks=[keras.callbacks.TensorBoard(run_dir / arm), recorder, images],
        )
    model.save(run_dir / f"{arm}.keras")
    record = results["arms"][arm]
    record["final"] = {metric: values[-1] for metric, values in record["history"].items()}
    record["final"]["parameters"] = model.count_params()


# --- Plots ---


def plot(run_dir, results):
    """Draw the article's two figures: training and validation accuracy of the arms."""
    for metric, name in {"acc": "training", "val_acc": "validation"}.items():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for arm, record in results["arms"].items():
            values = record["history"].get(metric, [])
            axes.plot(range(1, len(values) + 1), values, label=arm.replace("resnet", "ResNet"))
        axes.set(xlabel="epoch", ylabel=f"{name} accuracy")
        axes.set_title(f"ResNet and plain network, {name} accuracy on {results['data']}")
        axes.legend()
        save_figure(figure, run_dir / f"{name}_accuracy.png")


# --- Main ---


def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    args = parse_args(argv)
    if args.resume:
        args, run_dir, results = resume_run(args, argv)
    device = select_device(args.device, several=True)
    strategy = make_strategy(args.device)
    if not strategy.extended.should_checkpoint:  # of several machines the first keeps the files
        args.logdir = tempfile.mkdtemp()
        if args.resume:
            run_dir = pathlib.Path(shutil.copytree(run_dir, args.logdir, dirs_exist_ok=True))
    if not args.resume:
        run_dir, results = new_run_dir(args, "synthetic" if args.synthetic else "CIFAR-10", device)
    data = load_data(args.synthetic)
    for arm in args.arms:
        record = results["arms"].get(arm, {"history": {}, "final": {}})
        if not record["final"] or len(record["history"].get("acc", [])) < args.epochs:
            print(f"{arm}:")
            train(arm, args, data, strategy, run_dir, results)
    plot(run_dir, results)
    results["complete"] = True
    write_results(run_dir, results)
    report(run_dir, results)
    return {arm: record["final"] for arm, record in results["arms"].items()}


if __name__ == "__main__":
    run_as_command(main)
