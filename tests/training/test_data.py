"""Forms of training data: tools, images in messages, answers over several canvases."""

import json

import numpy as np
from PIL import Image

from mlx_dgemma.checkpoint.loading import load
from mlx_dgemma.demo.tasks import TASKS
from mlx_dgemma.training.batches import Batches, Noise
from mlx_dgemma.training.data import find_data, load_split


def test_tools_images_and_long_answers_become_examples(tmp_path):
    model, tokenizer = load(lazy=True)
    tool = TASKS["tool"].held_out(1)[0]
    Image.new("RGB", (96, 96), "white").save(tmp_path / "white.png")
    letters = "QXZJKVBPYGFWMUCLDRHSNIOATEQXZJKVBPYGFWMUCL"
    question = [{"type": "image", "image": "white.png"}, {"type": "text", "text": "What is it?"}]

    def talk(content, answer):
        return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]

    lines = [
        {"messages": talk("What is the weather in Oslo?", "Sunny."), "tools": tool.tools},
        {"messages": talk(question, "A circle.")},
        {"prompt": f"Repeat {letters}", "completion": letters},
    ]
    url = [{"type": "image_url", "image_url": {"url": "white.png"}}, question[1]]
    lines.append({"messages": talk(url, "A circle.")})
    content = "\ufeff" + "\n".join(map(json.dumps, lines))  # as Windows' editors begin a file
    (tmp_path / "train.jsonl").write_text(content, encoding="utf-8")
    with_tools, picture, long, linked = load_split(tmp_path, "train", model, tokenizer, 512)
    assert "get_weather" in tokenizer.decode(with_tools.prompt.tolist())
    assert len(picture.images) == len(linked.images) == 1
    assert (picture.prompt == model.config.image_token_id).sum() > 0
    canvas = model.config.canvas_length
    assert len(long.response) >= 2 * canvas
    assert len(long.response) % canvas == 0
    assert (long.response[-3:] == tokenizer.ids["eos"]).all()  # filled up to the canvas' end
    batches = Batches([long] * 4, 4, Noise(canvas, 896), 0)
    starts = {int(s) for step in range(8) for s in batches.at(step).starts}
    assert starts == {len(long.prompt) + n for n in range(0, len(long.response), canvas)}
    one, other = batches.at(0), Batches([long] * 4, 4, Noise(canvas, 896), 1).at(0)
    assert not np.array_equal(one.noisy, other.noisy)


def test_pictures_of_a_data_set_on_the_hub_come_with_its_lines(tmp_path, monkeypatch):
    from fnmatch import fnmatch

    import huggingface_hub

    stored = {"train.jsonl": "{}", "pictures/one.PNG": "", "two.jpeg": "", "model.safetensors": ""}

    def snapshot_download(repository, *, repo_type, allow_patterns):
        assert (repository, repo_type) == ("someone/signs", "dataset")
        for name, content in stored.items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_text(content)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    folder = find_data("someone/signs")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == set(stored) - {"model.safetensors"}
