"""sentence-transformers' trainer: BERT under a contrastive loss."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from transformers import BertConfig, BertModel

from benchmarks.setups import text
from benchmarks.setups.trainers import arguments
from benchmarks.setups.trial import Trial
from benchmarks.setups.truth import Truth


def sentence_transformers(trial: Trial) -> None:
    """Each row's answer is to be told from those of the other rows: the loss is no mean over rows."""
    tokenizer, pieces = text.tokenizer(), text.sentences(128)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    folder = trial.folder / "bert"
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder))
    model = SentenceTransformer(modules=[transformer, Pooling(config.hidden_size)], device="cpu")
    rows = {"anchor": pieces[::2], "positive": pieces[1::2]}
    given: dict[str, Any] = arguments(trial)
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(**given),
        train_dataset=Dataset.from_dict(rows),
        loss=MultipleNegativesRankingLoss(model),
    )
    trial.run(trainer, blocks="emb qk vo ffn norm other", truth=Truth(None))
