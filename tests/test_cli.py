"""The command line: quick help, flags that become a RunSpec, one sentence for every mistake, a clean stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import trdq_core
from tests.fake_runs import REPORT, FakeRuns
from trdq_core import arguments, cli
from trdq_core.errors import Cancelled, RecipeError, StorageError
from trdq_core.specs import RunSpec

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "models", "plan", "calibrate", "sample", "compare", "profile", "attention", "evaluate", "sensitivity", "budget",
    "download", "activations", "runs",
)  # fmt: skip
POCKET = ROOT / "assets" / "pocket-image" / "model_index.json"
needs_pocket = pytest.mark.skipif(not POCKET.exists(), reason="the pocket model is not in assets/pocket-image")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRuns:
    """The fake in the place of the real module."""
    fake = FakeRuns(tmp_path)
    monkeypatch.setitem(sys.modules, "trdq_core.runs", fake)
    monkeypatch.setattr(trdq_core, "runs", fake, raising=False)
    return fake


# Help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_loads_no_torch(command: str) -> None:
    code = (
        "import sys\nfrom trdq_core.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print(*[m for m in ('torch', 'numpy', 'diffusers', 'gradio') if m in sys.modules], file=sys.stderr)"
    )
    words = [command, "--help"] if command else ["--help"]
    seconds = []
    for _ in range(3):  # the best of three: other work on the machine must not fail this
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - started)
        if seconds[-1] < 1:
            break
    assert "usage: trdq" in done.stdout
    assert done.stderr.strip() == "", f"--help loads {done.stderr}"
    assert min(seconds) < 1


def test_module_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trdq_core", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"trdq {trdq_core.__version__}\n"


# Mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("compare --recipes tr-dk-w4a8", "did you mean tr-dq?"),
        ("compare --recipes rtn-w7a8", "weight bits: got 7; allowed are 2, 3, 4, 5, 6, 8."),
        ("compare --recipes fp,", "recipe: the name is empty"),
        ("compare --recipes fp,fp", "fp is named twice"),
        ("compare --groups 30 --steps 20", "at most as many groups as steps"),
        ("plan --edges 250,x", "give numbers with commas between them"),
        ("plan --edges 500,250", "rising timesteps"),
        ("plan --edges 250 --groups 3", "leave --groups out"),
        ("plan --edges 250 --group-kind uniform", "leave --group-kind out"),
        ("compare --steps 1", "allowed is 2 to 200"),
        ("compare --guidance 0", "allowed is 1 (off) to 30"),
        ("compare --prompts 0", "allowed is 1 or more"),
        ("compare --prompts 100000", "ask for at most that many"),
        ("compare --calibration-prompts 0", "allowed is 1 or more"),
        ("compare --spec no/such/spec.json", "no/such/spec.json cannot be read"),
        ("compare --recipe-file no/such.json", "no/such.json cannot be read"),
        ("evaluate --bits W5X", "--bits: got 'W5X'; write weight and activation bits, such as W4A8"),
        ("evaluate --bits W8A8,w8a8", "W8A8 is named twice"),
        ("evaluate --seeds 0", "seeds: got 0; allowed is 1 to 100"),
        ("evaluate --recipes rtn,", "recipe: the name is empty"),
        ("sensitivity --bits 4", "--bits: got '4'"),
        ("sensitivity --method fp", "give a method that quantizes"),
        ("budget --sensitivity no/such.json --bytes 3MB", "no/such.json cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(words: str, sentence: str, runs: FakeRuns, capsys: Any) -> None:
    assert cli.main(words.split()) == 2
    shown = capsys.readouterr()
    last = shown.err.strip().splitlines()[-1]
    assert sentence in last
    assert "Traceback" not in shown.err
    assert not runs.specs, "something ran"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("compare --backend cuda", "argument --backend: invalid choice"),
        ("compare --storage ram", "argument --storage: invalid choice"),
        ("compare --steps many", "argument --steps: invalid int value"),
        ("compare --prompts 2 --prompt owl", "not allowed with argument"),
        ("compair", "invalid choice: 'compair'"),
        ("", "required: COMMAND"),
        ("budget --bytes 3MB", "required: --sensitivity"),
        ("evaluate --seeds two", "argument --seeds: invalid int value"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(words: str, sentence: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    shown = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence in shown
    assert len(shown.strip().splitlines()) == 1


@pytest.mark.parametrize("prompt", ["", "   ", "a" * 10_000])
def test_prompts_that_cannot_be_used(prompt: str, runs: FakeRuns, capsys: Any) -> None:
    assert cli.main(["sample", "--prompt", prompt]) == 2
    assert "prompt: " in capsys.readouterr().err
    assert not runs.specs


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (RecipeError("bits: got 3."), 2, "bits: got 3."),
        (Cancelled("Cancelled during sample."), 130, "Cancelled during sample. It is in "),
        (KeyboardInterrupt(), 130, "Stopped."),
        (OSError(28, "No space left on device", "runs/x"), 2, "the disk is full"),
        (MemoryError(), 2, "Memory ran out"),
        (
            ZeroDivisionError("division by zero\nmore"),
            1,
            "Unexpected ZeroDivisionError: division by zero (TRDQ_DEBUG=1",
        ),
    ],
)
def test_no_traceback_reaches_a_person(
    error: BaseException, status: int, sentence: str, runs: FakeRuns, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRDQ_DEBUG", raising=False)
    runs.error = error
    assert cli.main(["compare", "--quiet"]) == status
    shown = capsys.readouterr().err
    assert sentence in shown.strip().splitlines()[-1]
    assert "Traceback" not in shown


def test_a_folder_that_cannot_be_made(tmp_path: Path, runs: FakeRuns, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["compare", "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not runs.specs


def test_a_full_disk_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.tempfile, "TemporaryFile", full)
    with pytest.raises(StorageError, match=r"cannot be written \(no space left on device\)"):
        cli.prepare_folder(tmp_path, RunSpec(command="compare", model="m"))


def test_another_run_is_not_written_over(tmp_path: Path, runs: FakeRuns, capsys: Any) -> None:
    (tmp_path / "spec.json").write_text(arguments.spec_from({"command": "compare", "seed": 1}).to_json())
    assert cli.main(["compare", "--seed", "2", "--out", str(tmp_path)]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert cli.main(["compare", "--seed", "1", "--out", str(tmp_path)]) == 0, "the same run may be repeated"


# What is shown


def test_compare_ends_in_a_table(runs: FakeRuns, capsys: Any, tmp_path: Path) -> None:
    assert cli.main(["compare", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert "fp-again (noise floor)" in shown.out
    assert "31.25" in shown.out
    assert str(tmp_path / "run") in shown.out
    assert "warning: something to know" in shown.err


def test_json_is_json_alone(runs: FakeRuns, capsys: Any) -> None:
    assert cli.main(["compare", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == REPORT
    assert cli.main(["plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tr-dq-w4a8"]["layers"][0]["kernel"] == "int4 packed"
    assert cli.main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "pocket-image"


def test_plan_shows_layers_totals_and_why_one_is_kept(runs: FakeRuns, capsys: Any) -> None:
    assert cli.main(["plan"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "blocks.0.attn1.to_q",
        "256x256",
        "W4A8",
        "int4 packed",
        "final projection",
        "4.88 bits",
        "on disk 156.2 KiB",
    ):
        assert part in shown
    assert "note: all sets stay on disk" in shown


def test_budget_shows_its_choice_and_writes_a_recipe(tmp_path: Path, capsys: Any) -> None:
    from tests.test_budget import LEAST, MOST, TABLE

    TABLE.save(tmp_path / "sensitivity.json")
    out, limit = tmp_path / "recipe.json", (LEAST + MOST) // 2
    words = ["budget", "--sensitivity", str(tmp_path), "--bytes", str(limit)]
    assert cli.main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"of {limit:,} bytes in memory; summed error" in shown
    assert "the least possible" in shown
    (recipe,) = arguments.spec_from({"command": "compare", "recipe_file": [str(out)]}).recipes
    assert recipe.name == f"rtn-{limit}-bytes"
    assert cli.main([*words, "--json", "--packed", "--error", "layer"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] <= limit
    assert cli.main(["budget", "--sensitivity", str(tmp_path), "--bytes", "1kB"]) == 2
    assert "give at least that" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(tmp_path / "no" / "such" / "recipe.json")]) == 2
    assert "check the path" in capsys.readouterr().err


# Stopping


def test_first_signal_asks_and_second_ends(capsys: Any) -> None:
    before = signal.getsignal(signal.SIGINT)  # not Python's own where a shell runs the tests in the background
    with cli.stop_on_signal() as cancelled:
        assert not cancelled()
        os.kill(os.getpid(), signal.SIGINT)
        assert cancelled()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "Stopping after this step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_can_run_commands() -> None:
    seen: list[bool] = []

    def work() -> None:
        with cli.stop_on_signal() as cancelled:
            seen.append(cancelled())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


# The whole way, in processes of their own


def trdq(*words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own."""
    command = [sys.executable, "-m", "trdq_core", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.slow
def test_compare_and_compare_again_from_its_spec(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--model", str(tiny_folder), "--recipes", "fp,rtn-w4a8", "--prompt", "red apple", "--seed", "0"]
    numbers = ["--calibration-prompts", "1", "--steps", "3", "--timing-rounds", "1"]
    done = trdq("compare", *words, *numbers, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "fp-again (noise floor)" in done.stdout
    row = json.loads((out / "report.json").read_text())["recipes"]["rtn-w4a8"]
    for name in (
        "psnr", "ssim", "latent_sqnr_db", "step_ms", "end_to_end_ms", "weight_bytes", "effective_bits",
        "peak_rss_bytes", "kernels", "simulated",
    ):  # fmt: skip
        assert name in row
    again = trdq("compare", "--spec", str(out / "spec.json"), "--out", str(tmp_path / "again"), "--json")
    assert again.returncode == 0, again.stderr
    repeated = json.loads(again.stdout)
    assert repeated["calibration"]["reused"]
    assert repeated["recipes"]["rtn-w4a8"]["psnr"] == row["psnr"]


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_finished(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["compare", "--model", str(tiny_folder), "--recipes", "fp,rtn-w8a8", "--prompts", "8", "--steps", "200"]
    command = [sys.executable, "-m", "trdq_core", *words, "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("images/fp_*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 130, shown
    assert "Stopping after this step" in shown
    assert shown.strip().endswith(f"kept. It is in {out}.")
    assert "Traceback" not in shown
    assert json.loads((out / "events.jsonl").read_text().splitlines()[-1])["kind"] == "cancelled"
    assert list(out.glob("images/fp_*.png"))
    assert (out / "report.json").exists()


@pytest.mark.slow
def test_clips_are_compared_and_compared_again_from_their_spec(tiny_video_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--model", str(tiny_video_folder), "--recipes", "fp,tr-dq-w4a8", "--groups", "2", "--prompts", "1"]
    numbers = ["--calibration-prompts", "1", "--steps", "2", "--timing-rounds", "1"]
    done = trdq("compare", *words, *numbers, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "temporal error" in done.stdout and "motion" in done.stdout
    assert json.loads((out / "spec.json").read_text())["prompts"] == ["alarm clock"], "the first for video models"
    again = trdq("compare", "--spec", str(out / "spec.json"), "--out", str(tmp_path / "again"), "--json")
    assert again.returncode == 0, again.stderr
    row = json.loads((out / "report.json").read_text())["recipes"]["tr-dq-w4a8"]
    repeated = json.loads(again.stdout)["recipes"]["tr-dq-w4a8"]
    for name in ("frame_psnr", "frame_ssim", "temporal_error", "motion_ratio", "worst_frame", "videos", "frames"):
        assert repeated[name] == row[name]
    assert all((out / video).exists() for video in row["videos"])


@needs_pocket
@pytest.mark.slow
def test_the_pocket_model_is_planned_and_sampled(tmp_path: Path) -> None:
    planned = trdq("plan", "--recipes", "tr-dq-w4a8", "--groups", "4")
    assert planned.returncode == 0, planned.stderr
    assert "tr-dq-w4a8: " in planned.stdout
    words = ["--recipe", "rtn-w8a8", "--prompt", "red apple", "--steps", "4", "--calibration-prompts", "1"]
    sampled = trdq("sample", *words, "--out", str(tmp_path))
    assert sampled.returncode == 0, sampled.stderr
    assert (tmp_path / "images" / "rtn-w8a8_000.png").exists()


@pytest.mark.slow
def test_an_unknown_model_is_one_sentence() -> None:
    done = trdq("plan", "--model", "no-such-model")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no-such-model" in done.stderr
