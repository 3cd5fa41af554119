"""The commands under `mlx.launch`: rank 0 speaks, the others follow; and the page that says how."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.distributed.processes import finish, free_ports, start

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "several-macs.md").read_text(encoding="utf-8")
MAIN = "import sys; from mlx._distributed_utils.{} import main; sys.exit(main())"
TOOLS = {"mlx.launch": "launch", "mlx.distributed_config": "config"}


def module(verb: str) -> list[str]:
    return [sys.executable, "-m", "mlx_dgemma", verb]


def test_the_pages_commands_exist_in_this_mlx():
    """Every flag of MLX's tools that the page names is in their help."""
    block = next(
        body for body in re.findall(r"```bash\n(.*?)```", PAGE, re.S) if "mlx.launch" in body
    )
    lines = block.replace("\\\n", " ").splitlines()
    assert len(lines) == 5
    checked = 0
    for line in lines:
        tool, *words = line.partition(" -- ")[0].split()
        if tool not in TOOLS:
            continue
        shown = subprocess.run(
            [sys.executable, "-c", MAIN.format(TOOLS[tool]), "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", shown), (tool, flag)
            checked += 1
    assert checked >= 7


@pytest.mark.slow
def test_mlx_launch_starts_a_command(tmp_path):
    """As a user types it: one reply, once."""
    port = free_ports(1)[0]
    found = subprocess.run(
        [sys.executable, "-c", MAIN.format("launch"), "-n", "2", "--backend", "ring",
         "--starting-port", str(port), "--", *module("generate"), "--demo", "count", "--seed", "3"],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip
    assert found.stdout.split() == [str(number) for number in range(20, 11, -1)]
    assert found.stderr.count("a right answer") == 1


@pytest.mark.slow
def test_rank_0s_flags_count(tmp_path):
    """Whatever the other ranks were started with."""
    ours = ["--prompt", "Count from 3 to 9.", "--seed", "1", "--json"]
    theirs = ["--prompt", "Sort 2 1.", "--preset", "turbo", "--seed", "9"]
    (out, errors), silent = finish(start(module("generate"), 2, tmp_path, arguments=[ours, theirs]))
    assert json.loads(out)["text"] == "3 4 5 6 7 8 9", errors
    assert silent == ("", "")


@pytest.mark.slow
def test_three_machines_are_refused_in_one_sentence(tmp_path):
    """An error of rank 0 ends all."""
    processes = start([*module("generate"), "--demo", "count"], 3, tmp_path)
    (_out, errors), *silent = finish(processes)
    assert errors == (
        "error: This model cannot be shared by 3 machines, as it has 4 attention heads: "
        "use 2 or 4.\n"
    )
    assert silent == [("", ""), ("", "")]
    assert [process.returncode for process in processes] == [2, 0, 0]


@pytest.mark.slow
def test_a_stock_client_talks_to_the_server_of_two_processes(tmp_path):
    """A reply, a stream that the client leaves, a stop string, two at once, and the end."""
    port = free_ports(1)[0]
    processes = start([*module("server"), "--port", str(port)], 2, tmp_path)
    assert processes[0].stderr is not None
    line = ""
    while "Serving" not in line:
        line = processes[0].stderr.readline()
        assert line, "the server ended"
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)

    def ask(text, **options):
        return client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": text}], seed=1, **options
        )

    try:
        assert ask("Count from 3 to 9.").choices[0].message.content == "3 4 5 6 7 8 9"
        with ask("Count from 1 to 40.", stream=True) as stream:
            next(iter(stream))  # and leave
        stopped = ask("Count from 3 to 9.", stop=["6"]).choices[0]
        assert stopped.message.content == "3 4 5 "
        assert stopped.finish_reason == "stop"
        with pytest.raises(openai.BadRequestError):
            ask("Count from 3 to 9.", temperature=-3)
        assert ask("Count from 3 to 9.").choices[0].message.content == "3 4 5 6 7 8 9"
    finally:
        processes[0].send_signal(signal.SIGTERM)
        said = finish(processes)
    assert "Traceback" not in said[0][1]
    assert [process.returncode for process in processes] == [130, 0]
    assert said[1] == ("", "")


@pytest.mark.slow
def test_the_doctor_measures_the_link(tmp_path):
    (out, errors), silent = finish(
        start([*module("doctor"), "--distributed", "--json"], 2, tmp_path)
    )
    found = json.loads(out)["distributed"]
    assert found["link"]["ranks"] == 2, errors
    assert min(found["link"]["latency"], found["link"]["sum_seconds"]) > 0
    assert found["link"]["sum_bytes"] == 256 * 2816 * 2
    assert found["pays"] == (found["together_seconds"] < found["alone_seconds"])
    assert len(found["rank_weight_bytes"]) == 2
    assert silent == ("", "")


@pytest.mark.slow
def test_the_benchmark_times_all_processes(tmp_path):
    flags = ["--prompt-tokens", "8", "--runs", "1", "--steps", "1", "--json"]
    (out, errors), silent = finish(start([*module("benchmark"), *flags], 2, tmp_path))
    found = json.loads(out)
    assert found["ranks"] == 2, errors
    assert found["components"] == {}, "rank 0 would time its part alone"
    assert silent == ("", "")


def test_a_comparison_measures_one_process(tmp_path, monkeypatch, capsys):
    """Refused on rank 0 as any of its flags."""
    from mlx_dgemma.cli.benchmark import main

    (tmp_path / "hosts.json").write_text('[["127.0.0.1:6001"], ["127.0.0.1:6002"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    monkeypatch.setenv("MLX_RANK", "0")
    assert main(["--compare", "mlx-vlm"]) == 2
    found = capsys.readouterr().err
    assert found == "error: --compare measures one process: start it without mlx.launch.\n"


def test_the_doctor_alone_says_how(capsys):
    from mlx_dgemma.cli.doctor import main

    assert main(["--distributed"]) == 2
    assert "start them with mlx.launch" in capsys.readouterr().err
