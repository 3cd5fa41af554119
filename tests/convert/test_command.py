"""The command line: mlx-lm's flags, one sentence per mistake, JSON, verify and inspect."""

import io
import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import recipes
from rich.console import Console

from mlx_dgemma.cli.convert import build_parser, main, print_modules
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.inspection import inspect
from mlx_dgemma.convert.verify import verify
from mlx_dgemma.demo import CHECKPOINT
from mlx_dgemma.errors import InputError


def test_mlx_lms_flags_are_ours():
    """Every flag of mlx_lm.convert but the one for running remote code."""
    from mlx_lm.convert import configure_parser

    theirs = {flag for action in configure_parser()._actions for flag in action.option_strings}
    ours = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert theirs - ours == {"--trust-remote-code"}


def test_convert_verify_inspect(checkpoint, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["--hf-path", str(checkpoint), "--mlx-path", out, "-q", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recipe"] == "4bit"
    assert report["written"]
    assert main(["verify", out, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"]
    assert "a forward pass" in result["checked"]
    assert "digests of all files" in result["checked"]
    assert main(["inspect", out]) == 0
    text = capsys.readouterr().out
    assert "model.decoder.layers.N.experts.gate_up_proj" in text
    assert "affine 4-bit, groups of 64" in text
    assert f"{report['total_size']:,} bytes" in text
    assert "\x1b" not in text


def test_mistakes_are_one_sentence_and_exit_2(checkpoint, tmp_path, capsys):
    source = str(checkpoint)
    for arguments in (
        ["--hf-path", source, "--mlx-path", str(tmp_path / "o"), "--recipe", "tiny"],
        ["--hf-path", source, "--mlx-path", str(tmp_path / "o"), "-q", "--q-rule", "nothing*=4"],
        ["--hf-path", source, "--mlx-path", str(tmp_path / "o"), "-q", "--q-rule", "oops"],
        ["--hf-path", source, "--mlx-path", str(tmp_path / "o"), "--q-bits", "7"],
        ["--hf-path", str(tmp_path / "absent"), "--mlx-path", str(tmp_path / "o")],
        ["--mlx-path", str(tmp_path / "o")],
        ["verify", str(tmp_path / "absent")],
        ["inspect", str(tmp_path)],
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_listed(capsys):
    assert main(["--list-recipes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("4bit", "quality", "small", "mixed_4_6"))


def test_the_docs_say_what_the_recipes_take():
    page = (Path(__file__).parents[2] / "docs" / "convert.md").read_text()
    table = page.split("| recipe | experts |")[1].split("\n\n")[0]
    written = {
        cells[0].strip("` "): tuple(cell.strip() for cell in cells[3:6])
        for line in table.splitlines()[2:]
        if (cells := line.strip("|").split("|"))
    }
    assert written == recipes.rows()


def test_a_tokenizer_that_cannot_be_read_is_a_problem(tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "demo")
    assert "tokenizer" in verify(folder, forward=False).checked
    (folder / "tokenizer.json").write_text("{")
    (problem,) = verify(folder, forward=False).problems
    assert "tokenizer.json cannot be read as a tokenizer" in problem


def test_a_folder_has_no_revision_to_inspect():
    with pytest.raises(InputError, match="has no revision v2"):
        inspect(CHECKPOINT, "v2")


def test_dry_run_and_notes(checkpoint, tmp_path, capsys):
    arguments = ["--hf-path", str(checkpoint), "--mlx-path", str(tmp_path / "o"), "--dry-run"]
    assert main([*arguments, "--q-bits", "4", "--q-group-size", "128"]) == 0
    captured = capsys.readouterr()
    assert "would write" in captured.out
    assert " MB in 1 file, " in captured.out
    assert "192 is no multiple of 128: 4-bit/64 instead" in captured.err


@pytest.fixture
def converted(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out", quantize=True)
    return tmp_path / "out"


def test_verify_finds_a_changed_byte(converted):
    path = converted / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(content)
    result = verify(converted, forward=False)
    assert not result.ok
    assert any("its digest differs" in problem for problem in result.problems)


def test_verify_finds_missing_files_and_truncation(converted):
    (converted / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json is missing" in verify(converted, forward=False).problems[0]
    path = converted / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    result = verify(converted)
    assert len(result.problems) == 1
    assert "truncated" in result.problems[0]


@pytest.mark.parametrize(
    ("recipe", "name", "value"),
    [
        ("4bit", "model.decoder.norm.weight", float("nan")),
        ("4bit", "model.decoder.layers.0.experts.down_proj.scales", float("inf")),
        ("4bit", "model.decoder.embed_tokens.biases", float("nan")),
        ("mxfp4", "model.decoder.layers.0.experts.down_proj.scales", 255),
        ("nvfp4", "model.decoder.layers.0.experts.down_proj.scales", 127),
    ],
)
def test_verify_finds_nan_and_inf(recipe, name, value, checkpoint, tmp_path):
    out = tmp_path / "out"
    convert(checkpoint, out, recipe=recipe)
    (out / "conversion.json").unlink()
    assert verify(out, forward=False).ok
    tensors = mx.load(str(out / "model.safetensors"))
    mx.eval(tensors)
    tensors[name][0] = value
    mx.save_safetensors(str(out / "model.safetensors"), tensors, {"format": "mlx"})
    problems = verify(out, forward=False).problems
    module = name.removesuffix(".scales").removesuffix(".biases")
    assert len(problems) == 1
    assert module in problems[0]
    assert "NaN or Inf" in problems[0]


def test_verify_finds_a_wrong_total(converted):
    (converted / "conversion.json").unlink()
    path = converted / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))
    assert any("total_size" in problem for problem in verify(converted, forward=False).problems)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_inspect_breaks_no_name(width):
    found = inspect(CHECKPOINT)
    console = Console(width=width, file=io.StringIO())
    print_modules(console, found)
    printed = console.file.getvalue()
    assert all(f"{row.module} " in printed.replace("\n", " ") for row in found.rows)
    assert ("stored as" in printed) == (width == 160)  # the table's heading


def test_inspect_counts_what_plan_counts(checkpoint, tmp_path):
    report = convert(checkpoint, tmp_path / "out", recipe="quality")
    found = inspect(tmp_path / "out")
    assert found.total_size == report.total_size
    assert found.parameters == report.parameters
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)


def test_inspect_says_which_mac_holds_the_real_model(tmp_path):
    """From sparse files with the real shapes: the published fit of 52 GB of bfloat16."""
    from real_shapes import published_config, write_sparse

    write_sparse(tmp_path / "real", published_config())
    found = inspect(tmp_path / "real")
    fits = {fit.memory_gb: fit.fits for fit in found.fits}
    assert found.parameters == 25_823_781_228
    assert (fits[24], fits[48], fits[64], fits[128]) == ("no", "no", "raise", "yes")


def test_a_copy_of_the_source_is_left_as_it_was(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    before = sorted(path.name for path in source.iterdir())
    verify(source, forward=False)
    inspect(source)
    assert sorted(path.name for path in source.iterdir()) == before
