"""`mlx_dgemma.lora` on the demo checkpoint: whole runs, resumed and killed ones, and mistakes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_dgemma.checkpoint.weights import load_model
from mlx_dgemma.cli.fuse import main as fuse
from mlx_dgemma.cli.lora import _read_config, main
from mlx_dgemma.convert import convert
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import CheckpointError, InputError, ResourceError
from mlx_dgemma.kernels.dispatch import twins_only
from mlx_dgemma.training import optimizers, run
from mlx_dgemma.training.loop import STATE
from mlx_dgemma.training.run_events import Evaluated, Report, Saved
from mlx_dgemma.training.save_folder import held
from mlx_dgemma.training.settings import Settings
from mlx_dgemma.training.tuning import WEIGHTS, read_tuning, write_config
from tests.distributed.processes import finish, start

QUICK = {
    "train": True, "batch_size": 2, "iters": 4, "rank": 2, "num_layers": 2, "learning_rate": 1e-3,
    "steps_per_report": 2, "steps_per_eval": 4, "save_every": 2, "val_batches": 1,
    "val_replies": 0, "encoder_weight": 0.5,
}  # fmt: skip


def line(word: str) -> dict:
    return {"messages": [
        {"role": "user", "content": f"Double {word}"},
        {"role": "assistant", "content": "".join(2 * c for c in word)},
    ]}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    words = ["ABC", "XYZ", "QRS", "MNO", "DEF", "GHI", "ABCDEFGHIJKLMNOPQRST"]
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(line(w)) for w in words))
    return folder


def trained(data, folder, *, stop_after=None, **changes):
    """Runs to the end, or until `stop_after` steps; the adapter's tensors and the events."""
    settings = Settings(**{**QUICK, "data": str(data), "adapter_path": str(folder), **changes})
    prepared = run.prepare(settings)
    count = []

    def cancelled():
        count.append(None)
        return stop_after is not None and len(count) > stop_after

    prepared.train(lambda _: None, cancelled=cancelled)
    return mx.load(str(folder / WEIGHTS)), prepared.events


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """What a run gives that nothing ended, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return *trained(data, folder), folder


def same(one, other) -> bool:
    return set(one) == set(other) and all(mx.array_equal(one[k], other[k]) for k in one)


def test_a_run_reports_saves_and_repeats_exactly(data, whole, tmp_path):
    first, events, folder = whole
    assert [type(e) for e in events] == [Report, Saved, Report, Evaluated, Saved]
    assert events[0].loss == pytest.approx(events[0].canvas_loss + 0.5 * events[0].encoder_loss)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["lora_parameters"]["rank"] == 2
    assert {name.rsplit(".", 1)[1] for name in first} == {"lora_a", "lora_b"}
    again, _ = trained(data, tmp_path / "b")
    assert same(first, again)
    other, _ = trained(data, tmp_path / "c", seed=1, iters=1)
    assert not same(first, other)


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(data, whole, tmp_path):
    trained(data, tmp_path / "parts", stop_after=3)
    settled, _ = trained(data, tmp_path / "parts", resume=True)
    assert same(whole[0], settled)
    with pytest.raises(CheckpointError, match="another learning-rate"):
        trained(data, tmp_path / "parts", resume=True, learning_rate=1e-2)
    with pytest.raises(InputError, match="no save to go on from"):
        trained(data, tmp_path / "new", resume=True)
    state = tmp_path / "parts" / STATE
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        trained(data, tmp_path / "parts", resume=True)


@pytest.mark.slow
def test_a_killed_run_loses_no_more_than_one_save_interval(data, whole, tmp_path):
    folder = tmp_path / "killed"
    flags = [
        "--train", "--data", data, "--adapter-path", folder, "--batch-size", 2, "--iters", 4,
        "--rank", 2, "--num-layers", 2, "--learning-rate", "1e-3", "--save-every", 1,
        "--val-replies", 0, "--encoder-weight", 0.5, "--val-batches", 1,
    ]  # fmt: skip
    command = [sys.executable, "-m", "mlx_dgemma", "lora", *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / STATE).exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, header = mx.load(str(folder / STATE), return_metadata=True)
    assert int(header["step"]) >= 1
    settled, _ = trained(data, folder, resume=True)
    assert same(whole[0], settled)


@pytest.mark.slow
def test_two_processes_train_what_one_does(data, whole, tmp_path):
    """Data-parallel over MLX's ring on the loopback: gradients are summed."""
    alone = whole[0]
    flags = [
        "--train", "--data", data, "--adapter-path", tmp_path / "two", "--batch-size", 2,
        "--iters", 4, "--rank", 2, "--num-layers", 2, "--learning-rate", "1e-3",
        "--val-replies", 0, "--encoder-weight", 0.5, "--val-batches", 1,
    ]  # fmt: skip
    command = [sys.executable, "-m", "mlx_dgemma", "lora", *map(str, flags)]
    told = finish(start(command, 2, tmp_path), timeout=300)
    assert [out.count("validation loss") for out, _ in told] == [1, 0], told
    together = mx.load(str(tmp_path / "two" / WEIGHTS))
    assert set(together) == set(alone)
    for name, tensor in alone.items():
        assert mx.abs(tensor - together[name]).max().item() < 1e-4, name


def test_the_command_tests_an_adapter_and_writes_a_report(data, whole, tmp_path, capsys):
    report, plot = tmp_path / "report.json", tmp_path / "plot.svg"
    flags = ["--test", "--data", str(data), "--adapter-path", str(whole[2])]
    extra = [
        "--val-replies", "1", "--test-batches", "1", "--report", str(report), "--plot", str(plot),
    ]  # fmt: skip
    assert main([*flags, *extra, "--batch-size", "2"]) == 0
    assert capsys.readouterr().out.startswith("Test loss ")
    written = json.loads(report.read_text())
    assert written["settings"]["rank"] == 2
    assert math.isfinite(written["test"]["loss"])
    assert plot.read_text().startswith("<svg")


def test_a_dry_run_plans_and_writes_no_adapter(data, tmp_path, capsys):
    flags = ["--train", "--data", str(data), "--adapter-path", str(tmp_path / "a"), "--dry-run"]
    assert main(flags) == 0
    assert "million parameters" in capsys.readouterr().err
    assert not list((tmp_path / "a").iterdir())


def test_yaml_settings_are_mlx_lms(data, tmp_path, capsys):
    file = tmp_path / "lora.yaml"
    file.write_text(
        f"train: true\ndata: {data}\niters: 3\nlora_parameters:\n  rank: 3\n  scale: 2.0\n"
    )
    flags = ["-c", str(file), "--adapter-path", str(tmp_path / "a"), "--dry-run", "--iters", "5"]
    assert main(flags) == 0
    assert "lora: " in capsys.readouterr().err


BAD_LINES = {
    "not json": ("{", "line 2 is not valid JSON"),
    "no object": ("[1]", "line 2: a JSON object is needed"),
    "no form": ('{"a": 1}', "line 2: none of messages"),
    "no answer": ('{"messages": [{"role": "user", "content": "a"}]}', "the last message must be"),
    "alone": ('{"messages": [{"role": "assistant", "content": "a"}]}', "a message is needed"),
    "strange": ('{"messages": "a"}', "messages must be a list"),
    "numbers": ('{"prompt": 1, "completion": 2}', "prompt and completion must be strings"),
    "long": (json.dumps({"text": "a" * 9000}), "--max-seq-length is 2048"),
    "canvas of padding": ('{"prompt": "a", "completion": " "}', "the assistant's message is empty"),
    "empty text": ('{"text": " "}', "text must be a string with something in it"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_line_that_cannot_be_used_is_named(tmp_path, capsys, kind):
    content, message = BAD_LINES[kind]
    (tmp_path / "train.jsonl").write_text(json.dumps(line("AB")) + "\n" + content + "\n")
    assert main(["--train", "--data", str(tmp_path), "--adapter-path", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "train.jsonl, line 2" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train",), "--data is missing"),
        (("--data", "DATA"), "Say what to do"),
        (("--train", "--data", "/nowhere"), "is no folder"),
        (("--train", "--data", "EMPTY"), "holds none of train.jsonl"),
        (("--train", "--data", "DATA", "--batch-size", "100"), "7 examples for a batch of 100"),
        (("--train", "--data", "DATA", "--iters", "0"), "iters 0 is not possible"),
        (("--train", "--data", "DATA", "--num-layers", "99"), "num_layers 99 is not possible"),
        (("--train", "--data", "DATA", "--scale", "nan"), "scale nan is not possible"),
        (("--train", "--data", "DATA", "-c", "/no.yaml"), "Cannot read /no.yaml"),
        (
            ("--train", "--data", "DATA", "--fine-tune-type", "dora", "--trainable", "experts"),
            "DoRA cannot train experts",
        ),
        (("--train", "--data", "DATA", "--seed", "-1"), "seed -1 is not possible"),
        (("--train", "--data", "DATA", "--rank", "99999999999"), "the model's width is 128"),
        (("--train", "--data", "DATA", "--val-batches", "-5"), "val_batches begins at -1"),
        (
            ("--train", "--data", "DATA", "--objective", "few-steps", "--rounds", "1001"),
            "1001 rounds need as many iters, and they are 1000",
        ),
        (("--train", "--data", "DATA", "--answers-per-prompt", "1001"), "ends at 1,000"),
        (("--train", "--data", "DATA", "--plot", "TRAIN"), "would replace data or another output"),
        (("--train", "--data", "DATA", "--report", "/no/x.json"), "--report /no/x.json cannot be"),
        (("--test", "--data", "DATA", "--adapter-path", "EMPTY"), "holds no adapters.safetensors"),
        (("--train", "--data", "DATA", "--adapter-path", "/proc/x"), "cannot be written"),
        (
            ("--train", "--data", "DATA", "--resume-adapter-file", "/no.safetensors"),
            "is missing or damaged",
        ),
    ],
)
def test_mistakes_get_one_sentence(data, tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    places = {
        "DATA": str(data),
        "TRAIN": str(data / "train.jsonl"),
        "EMPTY": str(tmp_path / "empty"),
    }
    given = [places.get(flag, flag) for flag in flags]
    if "--adapter-path" not in given:
        given += ["--adapter-path", str(tmp_path / "adapter")]
    assert main(given) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out


CONFIGURATIONS = {
    "unknown names of two types": ("1: 2\nfoo: 3\n", "'s 1 is no setting"),
    "too many digits": (f"seed: 1{'0' * 5000}\n", "is not valid YAML"),
    "too large a number": (f"learning_rate: 1{'0' * 400}\n", "learning_rate cannot be"),
    "deltas in a list": ("lora_parameters: [1]\n", "lora_parameters must hold names"),
    "nested keys": ("lora_parameters: {keys: [[a]]}\n", "keys cannot be"),
    "no linear map": ("lora_parameters: {keys: [self_attn]}\n", "no linear map 'self_attn'"),
    "parts of two types": ("trainable: [1, foo]\n", "trainable cannot be"),
    "one beta": ("optimizer_config: {betas: [0.9]}\n", "the optimizer adamw"),
    "no schedule": ("lr_schedule: {name: __class__, arguments: []}\n", "'__class__' is not one of"),
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_configuration_that_cannot_be_used_gets_one_sentence(data, tmp_path, capsys, kind):
    content, message = CONFIGURATIONS[kind]
    (tmp_path / "c.yaml").write_text(content)
    flags = ["--train", "--data", str(data), "--adapter-path", str(tmp_path / "a")]
    assert main([*flags, "-c", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_numbers_and_optimizers_are_written_as_in_mlx_lm(data):
    text = (
        "learning_rate: 1e-5\noptimizer: sgd\noptimizer_config: {sgd: {momentum: 5e-1}, adam: {}}\n"
        "lr_schedule: {name: cosine_decay, warmup: 4, arguments: [1e-3, 100]}\nreport_to: null\n"
    )
    (data / "c.yaml").write_text(text)
    found = Settings.from_config(_read_config(str(data / "c.yaml")), {"data": "x", "train": True})
    assert found.learning_rate == 1e-5
    assert found.optimizer_config == {"momentum": 0.5}
    assert found.make_optimizer().momentum == 0.5


def test_an_optimizers_step_on_joined_tensors_is_its_step_on_each(monkeypatch):
    found = []
    for joined in (0, 40, 1 << 20):
        monkeypatch.setattr(optimizers, "JOINED", joined)
        mx.random.seed(0)
        module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(3, 3))
        module.layers[1].set_dtype(mx.bfloat16)
        step = optimizers.Update(module, optim.AdamW(0.1), 1.0, 0.5)
        for number in range(3):
            key = mx.random.key(number)
            parameters = module.trainable_parameters()
            step(tree_map(lambda x: mx.random.normal(x.shape, x.dtype, key=key), parameters))  # noqa: B023
        found.append(dict(tree_flatten(module.parameters())))
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert mx.allclose(tensor, other[name], atol=1e-6), name


def test_a_step_with_bias_correction_is_pytorchs_adamw_with_googles_settings():
    import torch

    ours = optimizers.make_optimizer("adamw", 0.1, 1000, {"bias_correction": True}, None)
    slopes = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    weights = {"w": mx.zeros(6)}
    theirs = torch.zeros(6, requires_grad=True)
    reference = torch.optim.AdamW([theirs], 0.1, betas=(0.95, 0.99), weight_decay=1e-4)
    for slope in slopes:
        weights = ours.apply_gradients({"w": mx.array(slope)}, weights)
        theirs.grad = torch.tensor(slope)
        reference.step()
        assert np.allclose(np.array(weights["w"]), theirs.detach().numpy(), rtol=1e-3)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_save(data, tmp_path, capsys):
    flags = [
        "--train", "--data", str(data), "--adapter-path", str(tmp_path / "a"), "--batch-size", "2",
        "--iters", "50", "--learning-rate", "1e30", "--optimizer", "sgd", "--save-every", "1",
        "--val-replies", "0", "--rank", "2", "--steps-per-eval", "100", "--steps-per-report", "1",
        "--report", str(tmp_path / "report.json"),
    ]  # fmt: skip
    assert main(flags) == 2
    assert "is not a number" in capsys.readouterr().err
    weights = tmp_path / "a" / WEIGHTS
    assert weights.exists()
    assert json.loads((tmp_path / "report.json").read_text())["reports"]
    spoilt = {name: t * float("nan") for name, t in mx.load(str(weights)).items()}
    mx.save_safetensors(str(weights), spoilt)
    assert main([*flags[1:5], "--test", "--batch-size", "2", "--val-replies", "0"]) == 2
    assert "is not a number" in capsys.readouterr().err


def test_a_folder_is_written_by_one_run_at_a_time(data, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    half = folder / f".{STATE}.12-34.safetensors"  # as a kill leaves it
    half.touch()
    with held(folder), pytest.raises(ResourceError, match="another run is writing there"):
        trained(data, folder, iters=1)
    assert not half.exists()
    trained(data, folder, iters=1)


def test_an_adapter_is_never_read_with_anothers_configuration(data, tmp_path):
    """A run that is killed before its first save leaves the folder as it was."""
    one, _ = trained(data, tmp_path, iters=1)
    settings = {**QUICK, "data": str(data), "adapter_path": str(tmp_path), "rank": 3, "scale": 9.0}
    prepared = run.prepare(Settings(**settings))

    def killed(event):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        prepared.train(killed, cancelled=lambda: False)
    assert read_tuning(tmp_path).scale == 4.0
    assert same(one, mx.load(str(tmp_path / WEIGHTS)))
    facts = {"model": "demo", "objective": "diffusion", "alone": True}
    write_config(tmp_path, read_tuning(tmp_path), **facts)
    assert (tmp_path / WEIGHTS).exists()
    write_config(tmp_path, Settings(**settings).tuning, **facts)
    assert not (tmp_path / WEIGHTS).exists()


KINDS = {
    "lora": {},
    "dora": {"fine_tune_type": "dora"},
    "full": {"fine_tune_type": "full", "learning_rate": 1e-2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_asked_fused_and_exported(data, tmp_path, capsys, kind):
    """Beside the weights, merged into them and in PEFT's form it is the network that was
    trained."""
    folder = tmp_path / "adapter"
    settings = Settings(**{
        **QUICK, "data": str(data), "adapter_path": str(folder), "learning_rate": 3e-2,
        "iters": 2, **KINDS[kind],
    })  # fmt: skip
    prepared = run.prepare(settings)
    prepared.train(lambda _: None, cancelled=lambda: False)
    assert fuse(["--adapter-path", str(folder), "--save-path", str(tmp_path / "fused")]) == 0
    if kind == "dora":
        (tmp_path / "p").mkdir()  # an empty folder may be there
        here = (tmp_path / "p").stat().st_ino
    (tmp_path / "p.partial").mkdir()
    (tmp_path / "p.partial/half").touch()  # as a kill leaves it
    exported = fuse(["--adapter-path", str(folder), "--save-path", str(tmp_path / "p"), "--peft"])
    assert exported == (2 if kind == "full" else 0)
    if kind != "full":
        found = {path.name for path in (tmp_path / "p").iterdir()}
        assert found == {"adapter_config.json", "adapter_model.safetensors"}
        assert not (tmp_path / "p.partial").exists()
    if kind == "dora":
        assert (tmp_path / "p").stat().st_ino == here  # and a shell may be in it
    capsys.readouterr()

    def logits(model):
        cache = model.make_cache()
        model.prefill(np.arange(60, 80), cache)
        return model.denoise(mx.arange(32)[None] + 200, cache)

    def loaded(path, adapter=None):
        return logits(load_model(path, adapter_path=adapter))

    plain, beside = loaded(CHECKPOINT), loaded(CHECKPOINT, folder)
    scale = mx.abs(plain).max().item()
    assert mx.abs(beside - plain).max().item() > 0.05 * scale
    with twins_only():
        assert mx.abs(beside - logits(prepared.model)).max().item() < 1e-4 * scale
    if kind != "full":
        assert mx.abs(beside - loaded(CHECKPOINT, tmp_path / "p")).max().item() < 1e-4 * scale
    # The demo's weights are stored in 16 bits, which round what is merged into them; where that
    # changes the choice of an expert, a position's logits differ by more.
    rounded = mx.abs(beside - loaded(tmp_path / "fused")).mean().item()
    assert rounded < 0.1 * mx.abs(beside - plain).mean().item()


def test_whole_layers_of_another_model_are_refused(data, tmp_path, capsys):
    folder = tmp_path / "full"
    trained(data, folder, fine_tune_type="full", num_layers=1, iters=1)
    convert(CHECKPOINT, tmp_path / "4bit", recipe="4bit")
    with pytest.raises(CheckpointError, match="give the 16-bit checkpoint"):
        load_model(tmp_path / "4bit", adapter_path=folder)
    tensors = mx.load(str(folder / WEIGHTS))
    mx.eval(tensors)
    name = next(iter(tensors))
    for wrong, words in (
        ({name: mx.zeros((3, 3))}, "trained on another model"),
        ({"model.decoder.nothing": mx.zeros(1)}, "no such parameter"),
        ({name: tensors[name] * float("nan")}, "NaN or Inf"),
    ):
        mx.save_safetensors(str(folder / WEIGHTS), {**tensors, **wrong})
        with pytest.raises(CheckpointError, match=words):
            load_model(CHECKPOINT, adapter_path=folder)


def test_what_cannot_be_fused_gets_one_sentence(data, tmp_path, capsys):
    assert fuse(["--adapter-path", str(tmp_path)]) == 2
    assert fuse(["--adapter-path", str(tmp_path), "--peft", "--dequantize"]) == 2
    trained(data, tmp_path / "full", fine_tune_type="full", num_layers=1, iters=1)
    exported = ["--adapter-path", str(tmp_path / "full"), "--save-path", str(tmp_path / "x")]
    assert fuse([*exported, "--peft"]) == 2
    trained(data, tmp_path / "lora", iters=1)
    weights = tmp_path / "lora" / WEIGHTS
    export = ["--adapter-path", str(tmp_path / "lora"), "--peft", "--save-path"]
    assert fuse([*export, "/proc/x/y"]) == 2
    tensors = mx.load(str(weights))
    name = next(name for name in tensors if name.endswith("lora_a"))
    for wrong in (
        {**tensors, name: mx.zeros((3, 3))},
        {**tensors, name: tensors[name] * float("nan")},
        {key: value for key, value in tensors.items() if key != name},
    ):
        mx.save_safetensors(str(weights), wrong)
        assert fuse([*export, str(tmp_path / "x")]) == 2
    weights.write_bytes(b"")
    assert fuse([*export, str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "type full" in error
    assert all(words in error for words in ("do not fit", "NaN", "no low-rank delta", "truncated"))
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()
