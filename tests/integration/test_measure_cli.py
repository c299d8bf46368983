"""`sharpwatch measure` on real checkpoints: numbers, files, errors, and what a killed one leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import forked
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from sharpwatch.cli.main import main
from sharpwatch.cli.measure.data import TextWindows, load_batches
from sharpwatch.cli.measure.model import load

VOCABULARY = 300
LENGTH = 32
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
TEXT = "\n".join(text for _, text in sorted(topics.topics.items()))[:60_000]

# A user's module: a model that kills its own process in the middle of the work, at a given forward.
CRASHING = """
import os, signal
from transformers import GPT2LMHeadModel

FORWARDS = 0

class Crashing(GPT2LMHeadModel):
    def forward(self, *args, **kwargs):
        global FORWARDS
        FORWARDS += 1
        if FORWARDS == int(os.environ.get("CRASH_AT", "0")):
            os.kill(os.getpid(), int(os.environ["CRASH_BY"]))
        return super().forward(*args, **kwargs)

def make():
    return Crashing.from_pretrained("gpt2").eval()

def frozen():
    return make().requires_grad_(False)
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the text itself, that frames a row as BERT's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=LENGTH, **names)


def gpt2(vocabulary: int = VOCABULARY) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints `gpt2`, `narrow` (too few tokens), `bert` and `t5`, `text.txt`, `batch.pt` and a user's module."""
    root = tmp_path_factory.mktemp("checkpoints")
    words = tokenizer()
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    saved = {
        "gpt2": gpt2(),
        "narrow": gpt2(100),
        "bert": BertForMaskedLM(
            BertConfig(vocab_size=VOCABULARY, hidden_size=8, max_position_embeddings=LENGTH, **small)
        ),
        "t5": T5ForConditionalGeneration(
            T5Config(vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        ),
    }
    for name, model in saved.items():
        model.save_pretrained(root / name)
        words.save_pretrained(root / name)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    (root / "users_crash.py").write_text(CRASHING)
    ids = torch.randint(4, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.save({"input_ids": ids, "labels": ids}, root / "batch.pt")
    torch.save({"input_ids": ids, "labels": torch.full_like(ids, -100)}, root / "ignored.pt")
    return root


@pytest.fixture
def here(folder, monkeypatch, tmp_path):
    """The checkpoints' folder is the current one; returns a folder to write to."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("users_crash", None)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = forked.run(forked.COMMAND_LINE, arguments=("measure", *arguments), cwd=Path.cwd(), env=env, timeout=120)
    return subprocess.CompletedProcess(arguments, *done)


def found(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def without_cost(values):
    """`values` but for what they cost: a piece that was cut short is paid for twice."""
    if isinstance(values, dict):
        return {name: without_cost(value) for name, value in values.items() if name != "cost"}
    return values


def test_a_checkpoint_and_a_text_give_a_table_json_and_a_figure(here):
    json_file, plot = here / "found.json", here / "found.svg"
    options = ("--rows", "1", "--batches", "2", "--draws", "2", "--blocks", "qk,norm")
    done = command("gpt2", "text.txt", *options, "--json", str(json_file), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    expected = [line for line in done.stderr.splitlines() if "torchao" not in line and "_pytree.py" not in line]
    assert all(
        line.startswith("sharpwatch measure: ") for line in expected
    )  # of a slow machine; torchao has its own say
    assert [line.split()[0] for line in done.stdout.splitlines()[:4]] == ["block", "qk", "norm", "whole"]
    report = found(json_file)
    assert report["measured"]["model"] == "gpt2"
    assert set(report["blocks"]["qk"]["estimates"]) == {"gnb", "hutchinson"}
    assert sum(report["blocks"]["qk"]["spectrum"]["weights"]) == pytest.approx(1)
    assert report["tokens"] == 2 * (LENGTH - 1)
    model = gpt2().eval()
    batches = load_batches("text.txt", TextWindows(rows=1, batches=2), load("gpt2", "cpu", None), seed=0)
    losses = [model(**batch).loss.item() for batch in batches]
    assert report["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    svg = plot.read_text(encoding="utf-8")
    assert svg.startswith("<?xml")
    assert "gpt2 on text.txt" in svg


@pytest.mark.parametrize(("crash_at", "number"), [(25, signal.SIGKILL), (45, signal.SIGINT)])
def test_a_killed_measurement_goes_on_and_ends_as_if_it_had_not_been(here, crash_at, number, capsys):
    asked = ["users_crash:make", "batch.pt", "--draws", "6", "--seed", "3", "--estimators", "gnb,hutchinson,lanczos"]
    state, json_file, whole = here / "state.json", here / "found.json", here / "whole.json"
    resumable = [*asked, "--state", str(state), "--json", str(json_file)]
    killed = command(*resumable, CRASH_AT=str(crash_at), CRASH_BY=str(int(number)))
    assert not json_file.exists()
    if number == signal.SIGKILL:
        assert killed.returncode == -signal.SIGKILL
    else:
        assert killed.returncode == 128 + number
        assert "stopping after this piece; again to stop at once" in killed.stderr
        assert f"kept in {state}: the same command continues from there" in killed.stderr
        assert killed.stdout.startswith("block")
    begun = found(state)["measurement"]
    assert main(["measure", *resumable]) == 0
    assert main(["measure", *asked, "--json", str(whole)]) == 0
    for part in ("blocks", "layers", "whole"):
        assert without_cost(found(json_file)[part]) == without_cost(found(whole)[part])
    assert begun != found(state)["measurement"], "it was killed when all was done"
    assert "Traceback" not in capsys.readouterr().err


def test_a_state_takes_more_draws_but_not_another_seed(here, capsys):
    state = here / "state.json"
    asked = ["measure", "gpt2", "batch.pt", "--estimators", "gnb", "--quiet", "--state", str(state), "--draws"]
    assert main([*asked, "2"]) == 0
    first = found(state)["measurement"]["found"]["gnb"]
    assert main([*asked, "4"]) == 0
    assert found(state)["measurement"]["found"]["gnb"][:2] == first
    assert capsys.readouterr().out == ""
    assert main([*asked, "4", "--seed", "1"]) == 1
    assert (
        "its seed is 0, expected 1; move the file away, or repeat that measurement's options" in capsys.readouterr().err
    )


def test_a_precision_that_is_not_reached_leaves_everything_and_fails_with_one_line(here, capsys):
    json_file, plot = here / "found.json", here / "found.png"
    asked = ["--precision", "0.0001", "--max-draws", "3", "--draws", "2", "--estimators", "gnb"]
    assert main(["measure", "gpt2", "batch.pt", *asked, "--json", str(json_file), "--plot", str(plot)]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "emb: gnb's relative standard error is " in printed.err
    assert printed.out.startswith("block")
    assert set(found(json_file)["unreached"]) >= {"emb", "qk"}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("here")
def test_json_can_be_printed(capsys):
    assert main(["measure", "gpt2", "batch.pt", "--estimators", "gnb", "--draws", "2", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 30


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["narrow", "text.txt"], "is outside the model's vocabulary of 100"),
        (["gpt2", "ignored.pt"], "every label is ignored, so no position predicts"),
        (
            ["gpt2", "batch.pt", "--blocks", "head"],
            "must be among those that are trained, emb, qk, vo, ffn, norm, other",
        ),
        (["gpt2", "batch.pt", "--estimators", "linesearch"], "optimizer must be given for the estimators linesearch"),
        (["gpt2", "text.txt", "--length", "33"], "--length 33: this model takes 2 to 32 tokens"),
        (["gpt2", "text.txt", "--rows", "9999"], "DATA text.txt: is too short: --batches 1 of --rows 9999 need 9999"),
        (["gpt2", "gpt2/model.safetensors", "--batches", "2"], "has 1 batches, --batches asks for 2"),
        (["gpt2", "/dev/null"], "DATA /dev/null: does not exist; expected a text file"),
        (["t5", "text.txt"], "an encoder-decoder is trained on pairs of texts"),
        (["users_crash:frozen", "batch.pt"], "model must have a parameter that requires a gradient"),
        (["gpt2", "batch.pt", "--device", "cuda:99"], "--device cuda:99: is not there"),
        (["gpt2", "batch.pt", "--rules", "none.yaml"], "none.yaml: rules: can't be read"),
    ],
)
def test_what_cannot_be_measured_is_reported_in_one_line(arguments, expected, capsys):
    assert main(["measure", *arguments]) == 1
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_weights_that_are_missing_are_not_made_up(here, capsys):
    config = json.loads(Path("gpt2/config.json").read_text())
    (here / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    (here / "model.safetensors").write_bytes(Path("gpt2/model.safetensors").read_bytes())
    assert main(["measure", str(here), "batch.pt"]) == 1
    assert "the weight files lack 12 of the model's parameters: transformer.h.2.attn" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_windows_are_apart_and_spread_over_the_whole_text():
    loaded = load("gpt2", "cpu", None)
    one, two = load_batches("text.txt", TextWindows(rows=3, length=10, batches=2), loaded, seed=0)
    assert one["input_ids"].shape == two["input_ids"].shape == (3, 10)
    assert torch.equal(one["input_ids"], one["labels"])
    words = PreTrainedTokenizerFast.from_pretrained("gpt2")
    ids = words(TEXT, add_special_tokens=False)["input_ids"]
    rows = [row.tolist() for row in (*one["input_ids"], *two["input_ids"])]
    starts = [next(at for at in range(0, len(ids), 10) if ids[at : at + 10] == row) for row in rows]
    assert starts[0] == 0
    assert starts[-1] > 0.8 * len(ids)
    assert starts == sorted(set(starts))


@pytest.mark.usefixtures("here")
def test_a_masked_model_guesses_a_share_of_the_text_chosen_by_the_seed():
    loaded = load("bert", "cpu", None)
    (batch,) = load_batches("text.txt", TextWindows(rows=64), loaded, seed=0)
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == (64, LENGTH)
    assert (ids[:, 0] == 1).all()
    assert (ids[:, -1] == 2).all()
    guessed = labels != -100
    assert 0.12 < guessed.float().mean() < 0.18
    assert not guessed[:, [0, -1]].any()
    assert 0.7 < (ids[guessed] == SPECIAL.index("[MASK]")).float().mean() < 0.9
    kept = ~guessed
    (other,) = load_batches("text.txt", TextWindows(rows=64), loaded, seed=1)
    assert not torch.equal(labels, other["labels"])
    both = kept & (other["labels"] == -100)
    assert torch.equal(ids[both], other["input_ids"][both])


@pytest.mark.usefixtures("here")
def test_a_masked_model_is_measured(capsys):
    asked = ["--rows", "2", "--estimators", "gnb", "--draws", "2", "--json", "-"]
    assert main(["measure", "bert", "text.txt", *asked]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"]["head"]["trace"]["value"] > 0


def test_a_mistyped_option_is_answered_without_torch():
    code = (
        "import sys; from sharpwatch.cli.main import main; main(['measure', 'm', 'd', '--draws', 'x']);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
