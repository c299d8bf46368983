"""Logs of other trainers, in the form in which these write them: what is read of each, and how a bad one is refused.

The lines are of the form of NVIDIA/Megatron-LM (megatron/training/training.py, `training_log`), pytorch/torchtitan
(components/metrics.py, `MetricsProcessor.log`) and transformers (`TrainerState.save_to_json`).
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import os

import pytest

from sharpwatch.errors import LogError
from sharpwatch.replay.files import ReadOptions, expand, read_run

MEGATRON = """\
training ...
[before the start of training step] datetime: 2026-01-16 07:30:11
 [2026-01-16 07:32:24] iteration        5/     100 | consumed samples:        10240 | elapsed time per iteration \
(ms): 15800.0 | throughput per GPU (TFLOP/s/GPU): 490.0 | learning rate: 4.134000E-07 | global batch size:  2048 | \
lm loss: 1.344240E+01 | seq_load_balancing_loss: 1.000203E+00 | loss scale: 1.0 | grad norm: 2.870 | num zeros: \
1174412544.0 | params norm: 8660.607 | number of skipped iterations:   0 | number of nan iterations:   0 |
(min, max) time across ranks (ms):
    evaluate .......................................: (1000.00, 1001.00)
 validation loss at iteration 5 | lm loss value: 7.174200E+00 | lm loss PPL: 1.305315E+03 |
 [2026-01-16 07:32:39] iteration        6/     100 | consumed samples:        12288 | elapsed time per iteration \
(ms): 15639.0 | throughput per GPU (TFLOP/s/GPU): 494.6 | learning rate: 4.180800E-07 | global batch size:  2048 | \
lm loss: 1.342407E+01 | seq_load_balancing_loss: 1.000202E+00 | loss scale: 1.0 | grad norm: 2.867 | num zeros: \
1174412672.0 | params norm: 8660.606 | number of skipped iterations:   0 | number of nan iterations:   0 |
"""
TORCHTITAN = """\
[rank0]:[titan] 2026-02-01 10:00:00,123 - root - INFO - Training starts at step 1.
[rank0]:[titan] 2026-02-01 10:00:05,123 - root - INFO - \x1b[31mstep:  1  \x1b[32mloss:  8.04910  \
\x1b[38;2;180;60;0mgrad_norm:  1.3412  \x1b[38;2;54;234;195mmemory:  1.04GiB(1.32%)  \x1b[34mtps: 8,120  \
\x1b[36mtflops: 0.58  \x1b[35mmfu: 0.19%\x1b[39m
[rank1]:[titan] 2026-02-01 10:00:05,124 - root - INFO - \x1b[31mstep:  1  \x1b[32mloss:  9.99999  \
\x1b[38;2;180;60;0mgrad_norm:  9.9999  \x1b[38;2;54;234;195mmemory:  1.04GiB(1.32%)  \x1b[34mtps: 8,120\x1b[39m
[rank0]:[titan] 2026-02-01 10:00:06,123 - root - INFO - \x1b[33mvalidate step:  1  \x1b[32mloss:  7.5000  \
\x1b[38;2;54;234;195mmemory:  1.04GiB(1.32%)  \x1b[34mtps: 8,120\x1b[39m
[rank0]:[titan] 2026-02-01 10:00:15,123 - root - INFO - step: 10  loss:      nan  grad_norm:     nan  memory: \
 1.29GiB(1.64%)  tps: 152,301  tflops: 10.90  mfu: N/A
"""
TRAINER_STATE = {
    "best_metric": None,
    "epoch": 0.2,
    "global_step": 20,
    "log_history": [
        {"epoch": 0.1, "grad_norm": 2.5, "learning_rate": 5e-05, "loss": 3.25, "step": 10},
        {"epoch": 0.1, "eval_loss": 3.0, "eval_runtime": 1.5, "step": 10},
        {"epoch": 0.2, "grad_norm": math.nan, "learning_rate": 4e-05, "loss": 0.0, "step": 20},
        {"epoch": 0.2, "train_loss": 1.6, "train_runtime": 12.0, "step": 20},
    ],
    "max_steps": 20,
}


@pytest.fixture
def written(tmp_path):
    def write(content, name="run.log"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def read(path, **options):
    return read_run(path, ReadOptions(**options))


def rows(run):
    """(step, loss, gradient norm, learning rate); None where nothing was measured, nan for a bad gradient."""
    found = []
    for seen in run.observations:
        layers = seen.layers
        norm = None if layers is None else float(layers.gradient_norm[0])
        if layers is not None and math.isnan(norm) and not layers.non_finite[0]:
            norm = None
        rate = None if layers is None else float(layers.learning_rate[0])
        found.append((seen.step, seen.loss, norm, rate))
    return found


def approximately(expected):
    """The rows, to single precision; None only equals None."""
    return [
        tuple(None if value is None else pytest.approx(value, rel=1e-6, nan_ok=True) for value in row)
        for row in expected
    ]


def test_megatron(written):
    run = read(written(MEGATRON))
    assert run.format == "megatron"
    assert rows(run) == approximately([(5, 13.4424, 2.870, 4.134e-7), (6, 13.42407, 2.867, 4.1808e-7)])
    assert run.names == {"step": "iteration", "loss": "lm loss", "grad-norm": "grad norm", "lr": "learning rate"}


def megatron_line(step, loss, skipped=0, nans=0, rank=""):
    loss = f" lm loss: {loss} |" if loss else ""
    return (
        f"{rank} iteration {step:8d}/     100 | consumed samples: 10 | learning rate: 1.0E-04 |{loss} "
        f"loss scale: 1.0 | number of skipped iterations: {skipped:3d} | number of nan iterations: {nans:3d} |\n"
    )


def test_megatron_leaves_out_a_loss_that_is_nan_and_prints_0_for_steps_that_it_skips(written):
    lines = [
        megatron_line(1, "1.0E+00"),
        megatron_line(2, "0.000000E+00", skipped=1),
        megatron_line(3, "", skipped=1),
        megatron_line(4, "0.000000E+00", skipped=1, nans=1),
        megatron_line(5, ""),
    ]
    losses = [loss for _, loss, _, _ in rows(read(written("".join(lines))))]
    assert losses == [1.0, None, None, pytest.approx(math.nan, nan_ok=True), pytest.approx(math.nan, nan_ok=True)]


def test_megatron_of_several_ranks_and_launchers(written):
    text = megatron_line(1, "1.0E+00", rank="[default7]: [2026-09-14 15:08:27.273656]")
    text += megatron_line(1, "1.0E+00", rank="[default6]: [2026-09-14 15:08:27.273656]")
    assert [loss for _, loss, _, _ in rows(read(written(text)))] == [1.0]
    neox = " samples/sec: 12.345 | iteration       10/  320000 | elapsed time per iteration (ms): 100.0 | learning "
    neox += "rate: 1.0E-06 | lm_loss: 1.05E+01 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    assert rows(read(written(neox))) == approximately([(10, 10.5, None, 1e-6)])


def test_torchtitan(written):
    run = read(written(TORCHTITAN))
    assert run.format == "torchtitan"
    (one, ten) = rows(run)
    # No rate is printed: the detectors get a constant one, and judge none.
    assert one == pytest.approx((1, 8.0491, 1.3412, 1.0))
    assert "lr" not in run.names
    assert (ten[0], math.isnan(ten[1]), math.isnan(ten[2])) == (10, True, True)


def test_torchtitan_without_a_gradient_norm(written):
    run = read(written("step:  1  loss:  8.0491  memory:  1.04GiB(1.32%)  wps: 8,120  mfu: 0.19%\n"))
    assert rows(run) == [(1, 8.0491, None, None)]


@pytest.mark.parametrize("indent", [None, 2])
def test_trainer_state(written, indent):
    run = read(written(json.dumps(TRAINER_STATE, indent=indent)))
    assert run.format == "trainer-state"
    assert rows(run) == approximately([(10, 3.25, 2.5, 5e-5), (20, 0.0, math.nan, 4e-5)])


def test_a_log_history_alone(written):
    assert len(read(written(json.dumps(TRAINER_STATE["log_history"]))).observations) == 2


@pytest.mark.parametrize(
    "header",
    [
        "step,loss,grad_norm,lr",
        "global_step,train/loss,train/grad_norm,train/learning_rate",
        "iteration,train_loss,gradient_norm,learning_rate",
        "Step,gpt2-a1 - train/loss,gpt2-a1 - grad-norm,gpt2-a1 - lr",
        "step,train_loss_step,grad_2.0_norm_total,lr-AdamW",
        "num_updates,LOSS,gnorm,Learning Rate",
    ],
)
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_csv_under_usual_names(written, header, delimiter):
    lines = [header, "1,3.5,1.5,0.1", "2,NaN,,", "", "4,,inf,0.2", "5,-Infinity,nan,"]
    run = read(written("\r\n".join(lines).replace(",", delimiter) + "\r\n"))
    expected = [(1, 3.5, 1.5, 0.1), (2, math.nan, None, 0.1), (4, None, math.nan, 0.2), (5, -math.inf, math.nan, 0.2)]
    assert rows(run) == approximately(expected)


@pytest.mark.parametrize(("compress", "suffix"), [(gzip.compress, "gz"), (lzma.compress, "xz")])
def test_compressed(written, compress, suffix):
    text = b"step,loss\n1,2.5\n2,2.25\n"
    assert [row[:2] for row in rows(read(written(compress(text), f"a.csv.{suffix}")))] == [(1, 2.5), (2, 2.25)]
    with pytest.raises(LogError, match=r"cut off or damaged.*up to line \d"):
        read(written(compress(text * 1000)[:-9], "b.csv"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_csv_as_windows_writes_it(written, encoding):
    assert rows(read(written("step,loss\r\n1,2.5\r\n".encode(encoding)))) == [(1, 2.5, None, None)]


def test_json_lines_that_share_a_step(written):
    lines = [
        {"config": {"lr": "cosine"}},
        {"step": 1, "train": {"loss": 3.5}},
        {"step": 1, "train/grad_norm": 1.5, "eval/loss": 9},
        {"_step": 7, "step": 2, "train/loss": "NaN", "train/grad_norm": None},
    ]
    run = read(written("\n".join(map(json.dumps, lines))))
    assert run.format == "jsonl"
    assert rows(run) == approximately([(1, 3.5, 1.5, 1.0), (2, math.nan, None, 1.0)])


def test_the_column_with_most_values_counts_and_another_can_be_named(written):
    path = written("step,loss,train_loss,nll\n1,,2.5,7\n2,3.5,2.25,8\n3,,2.0,9\n")
    assert [loss for _, loss, _, _ in rows(read(path))] == [2.5, 2.25, 2.0]
    assert [loss for _, loss, _, _ in rows(read(path, names={"loss": "nll"}))] == [7, 8, 9]
    with pytest.raises(LogError, match=r"no value of 'nl', which is given as the loss; there are step, "):
        read(path, names={"loss": "nl"})


def test_two_losses_as_long_are_said(written):
    run = read(written("step,loss,train_loss\n1,3.5,2.5\n"))
    assert run.names["loss"] == "loss"
    assert run.notes == ("loss is 'loss'; --column loss=NAME takes another: train_loss",)


def test_rows_without_a_step_are_counted(written):
    run = read(written("loss;lr\n3.5;1\n2.5;1\n"))
    assert [step for step, _, _, _ in rows(run)] == [1, 2]
    assert run.notes == ("there is no step: rows are counted from 1",)


def test_a_step_that_comes_again_after_a_restart_is_kept(written):
    assert [row[0] for row in rows(read(written("step,loss\n1,3\n2,3\n3,3\n2,3\n3,3\n")))] == [1, 2, 3, 2, 3]


@pytest.mark.parametrize("text", ["step,loss\n1,3.5\n2", '{"step": 1, "loss": 3.5}\n{"step": 2, "lo'])
def test_the_last_line_of_a_log_that_is_still_written(written, text):
    run = read(written(text))
    assert [row[:2] for row in rows(run)] == [(1, 3.5)]
    assert run.notes == ("the last line is incomplete and left out",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"run\.log: the file is empty; valid are CSV, JSON lines, trainer_state\.json"),
        (" \n\n", "the file is empty"),
        (b"\x7fELF\x02\x01\x00\x00\x00", "a binary file of an unknown format; valid are"),
        (b"\x80\x02}q\x00(X\x05\x00", "a binary file of an unknown format"),
        ("Dear diary,\ntoday I trained.\n", "the format is not known by its content .it begins with 'Dear diary,'"),
        ("step,loss\n", "there is neither a loss, a gradient norm nor a learning rate|no step has"),
        ("step,loss\n1,\n", "there is neither a loss"),
        ("epoch,accuracy\n1,0.5\n", r"run\.log:1: no column is known: epoch, accuracy\. Known are such as step, loss"),
        ("step,loss\n1,3.5\n2,3.5,1\n3,1\n", r"run\.log:3: 3 cells, but the header has 2 columns: step, loss"),
        ("step,loss\n1,3.5\n2,high\n", r"run\.log:3: loss must be a number, nan, inf or empty, got 'high'"),
        ("step,loss\n1.5,3.5\n", r"run\.log:2: step must be a whole number, 0 or more, got 1\.5"),
        ("step,loss\nnan,3.5\n", r"run\.log:2: step must be a whole number, 0 or more, got nan"),
        ("step,loss\n-1,3.5\n", r"run\.log:2: step must be a whole number, 0 or more, got -1"),
        ('{"loss": 1}\n{"loss": \n{"loss": 3}\n', r"run\.log:2: not JSON: "),
        ('{"loss": 1}\n[2]\n', r"run\.log:2: must be a JSON object, got '\[2\]'"),
        ('{"loss": 1}\n{"loss": true}\n', r"run\.log:2: loss must be a number, nan, inf or empty, got 'True'"),
        ('{"loss": 1}\n{"loss": [2]}\n', r"run\.log:2: loss must be a number"),
        ('{"a": 1}\n{"b": 2}\n', "there is neither a loss.*there are a, b. --column loss=NAME"),
        (
            '{\n  "log_history": [\n    {"loss": 1},\n    {"lo',
            r"run\.log:4: not a whole JSON file.*trainer_state\.json",
        ),
        ('{\n  "log_history": []\n}', "log_history is empty: nothing was logged"),
        ('{"vocab": 1}', "must have a list of records, log_history"),
        ('{"log_history": 3}', "must have a list of records, log_history"),
    ],
)
def test_what_is_no_log_is_refused_with_where_and_what_is_valid(written, content, message):
    with pytest.raises(LogError, match=message):
        read(written(content))


def test_a_format_that_is_forced(written):
    path = written(MEGATRON)
    assert read(path, format="megatron").format == "megatron"
    with pytest.raises(LogError, match="there is neither a loss"):
        read(path, format="torchtitan")
    with pytest.raises(LogError, match=r"run\.log:1: not JSON"):
        read(path, format="jsonl")
    with pytest.raises(LogError, match="no TensorBoard event can be read"):
        read(path, format="tensorboard")
    for own in ("recording", "journal"):
        with pytest.raises(LogError, match=r"no recording|not a journal"):
            read(path, format=own)


def test_a_pipe_is_read_once():
    reading, writing = os.pipe()
    os.write(writing, b"step,loss\n1,3.5\n")
    os.close(writing)
    assert rows(read(f"/dev/fd/{reading}")) == [(1, 3.5, None, None)]
    os.close(reading)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(LogError, match="nowhere: No such file or directory"):
        read(str(tmp_path / "nowhere"))
    with pytest.raises(LogError, match="neither TensorBoard's event files nor a trainer_state"):
        expand(str(tmp_path))


def test_a_folder_stands_for_its_runs(tmp_path):
    for checkpoint in ("checkpoint-10", "checkpoint-20"):
        (tmp_path / checkpoint).mkdir()
        (tmp_path / checkpoint / "trainer_state.json").write_text(json.dumps(TRAINER_STATE))
    assert expand(str(tmp_path / "checkpoint-10")) == [str(tmp_path / "checkpoint-10/trainer_state.json")]
    assert expand(str(tmp_path)) == [str(tmp_path / "checkpoint-20/trainer_state.json")]
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "events.out.tfevents.1.host").write_bytes(b"")
    assert expand(str(tmp_path)) == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert expand(str(tmp_path / "a")) == [str(tmp_path / "a")]
    assert expand("sqlite:///x.db") == ["sqlite:///x.db"]
