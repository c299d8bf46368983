"""The rows of the token embedding, grouped by how often their tokens occur in the batches.

The gradient of a row is that of one token. Frequent and rare tokens are seldom equally sharp, which the trace of the
whole block hides.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.estimators.gnb import RowGroups
from sharpwatch.curvature.measure.validation import find_input_embedding
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.state.isolation import unwrap
from sharpwatch.curvature.statistics.estimate import Estimate, per_parameter
from sharpwatch.errors import ProbeError

EMBEDDING = "emb"
UNSEEN = "unseen"
_GROUPS = 10


# In the report


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """The rows of tokens that occur about equally often.

    Attributes:
        tokens: Number of tokens, which is that of rows.
        parameters: Number of entries of these rows.
        min_count: How often the rarest of the tokens occurs in the batches.
        max_count: How often the most frequent one does.
        share: Share of the tokens in all occurrences, 0 to 1.
        trace: Trace of the Gauss-Newton matrix over these rows, by `gnb`.
    """

    tokens: int
    parameters: int
    min_count: int
    max_count: int
    share: float
    trace: Estimate

    @property
    def sharpness(self) -> Estimate:
        """The trace over the number of parameters, as `BlockReport.sharpness`."""
        return per_parameter(self.trace, self.parameters)


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """The token embedding's sharpness by deciles of token frequency.

    The tokens that occur in the batches are ordered by how often they do, and cut into ten groups of as equal a number
    of *distinct tokens* as possible; the most frequent are group "1", and equal counts are ordered by token id. With
    fewer than ten such tokens there is a group for each. Tokens that do not occur are the group "unseen". A token at a
    position that `attention_mask` leaves out does not count there; an encoder-decoder's decoder inputs count where it
    shares the embedding.

    The draws are those of the blocks' `gnb` estimates, so the groups' traces add up to that of the parameter: the block
    `emb`, unless `others` names more of it. Where the head is the same parameter, a row's gradient is the sum of both
    uses, and that of an unseen token is not zero.

    Attributes:
        parameter: Name of the embedding [vocabulary, width]; empty without groups.
        groups: The groups by name, most frequent first, `unseen` last; one without tokens is missing.
        tied: Other names of the same parameter where it is no embedding, such as "lm_head.weight".
        others: Other trained parameters of the block `emb`, which are in none of the groups.
        reason: Why there are no groups; empty if there are.
    """

    parameter: str = ""
    groups: Mapping[str, TokenGroup] = field(default_factory=dict)
    tied: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    reason: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the groups must know, in words."""
        notes = [f"not measured: {self.reason}"] if self.reason else []
        if self.tied:
            notes.append(f"{self.parameter} is also {', '.join(self.tied)}: a row's trace is of both uses together")
        if self.others:
            notes.append(f"the block {EMBEDDING} also has {', '.join(self.others)}")
        return tuple(notes)


# Before the draws


@dataclass(frozen=True, slots=True, eq=False)
class Frequencies:
    """The groups of an embedding's rows before anything is drawn; the attributes are those of `EmbeddingRows`.

    Attributes:
        counts: How often each token of each group occurs, by name: int64 [tokens], descending.
        rows: The rows of the groups, in the same order.
    """

    parameter: str
    width: int
    tied: tuple[str, ...]
    others: tuple[str, ...]
    counts: Mapping[str, Tensor]
    rows: RowGroups

    def report(self, traces: Sequence[Estimate]) -> EmbeddingRows:
        """The report.

        Args:
            traces: The trace of each group, in their order.
        """
        total = sum(int(counts.sum()) for counts in self.counts.values())
        groups = {
            name: TokenGroup(
                tokens=len(counts),
                parameters=len(counts) * self.width,
                min_count=int(counts[-1]),
                max_count=int(counts[0]),
                share=int(counts.sum()) / total,
                trace=trace,
            )
            for (name, counts), trace in zip(self.counts.items(), traces, strict=True)
        }
        return EmbeddingRows(self.parameter, groups, self.tied, self.others)


def token_frequencies(
    model: nn.Module, block_map: BlockMap, batches: Sequence[Batch], trained: Collection[str]
) -> Frequencies | EmbeddingRows:
    """Group the rows of the token embedding; see `EmbeddingRows`.

    Args:
        model: The model.
        block_map: The blocks of all its parameters.
        batches: The batches.
        trained: Names of the trained parameters.

    Returns:
        The groups; if the rows or their tokens are not known, a report that has the reason.
    """
    try:
        return _frequencies(model, block_map, batches, trained)
    except ProbeError as error:
        return EmbeddingRows(reason=str(error))


def _frequencies(
    model: nn.Module, block_map: BlockMap, batches: Sequence[Batch], trained: Collection[str]
) -> Frequencies:
    parameter, table = _find_table(model, block_map)
    if parameter not in trained:
        raise ProbeError(f"{parameter} is frozen")
    names = [name for name, other in model.named_parameters(remove_duplicate=False) if other is table]
    lookups = [name for name in names if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)]
    counts = torch.zeros(table.shape[0], dtype=torch.int64, device="cpu")
    for batch in batches:
        for ids in _token_ids(unwrap(model), batch, shared=len(lookups) > 1):
            counts += torch.bincount(ids[(ids >= 0) & (ids < len(counts))], minlength=len(counts))
    if not counts.any():
        raise ProbeError(f"no token of the batches is a row of {parameter}")
    rows = _cut(counts)
    in_block = dict.fromkeys(part.parameter for part in block_map.parts if part.type == EMBEDDING)
    return Frequencies(
        parameter=parameter,
        width=table.shape[1],
        tied=tuple(name for name in names if name not in lookups),
        others=tuple(name for name in in_block if name != parameter and name in trained),
        counts={name: counts[index] for name, index in rows.items()},
        rows=RowGroups(parameter, tuple(index.to(table.device) for index in rows.values())),
    )


def _cut(counts: Tensor) -> dict[str, Tensor]:
    """Token ids of each group by its name, most frequent first."""
    order = counts.argsort(descending=True, stable=True)
    count = int((counts > 0).sum())
    seen, unseen = order[:count], order[count:]
    deciles = seen.tensor_split(min(_GROUPS, len(seen)))
    groups = {str(number): ids for number, ids in enumerate(deciles, 1)}
    return groups | ({UNSEEN: unseen} if len(unseen) else {})


def _find_table(model: nn.Module, block_map: BlockMap) -> tuple[str, nn.Parameter]:
    """The embedding that token ids are looked up in, and its name."""
    whole = {part.parameter for part in block_map.parts if part.type == EMBEDDING and part.dim is None}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tables: dict[str, nn.Parameter] = {}
    for module in model.modules():
        # Not `module.weight`: where it is computed, by a parametrization, that may change the module.
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if isinstance(module, nn.Embedding) and weight is not None and names[id(weight)] in whole:
            tables[names[id(weight)]] = weight
    if len(tables) > 1:
        own = find_input_embedding(unwrap(model))
        tables = {name: table for name, table in tables.items() if own is None or table is own.weight}
    if len(tables) > 1:
        raise ProbeError(f"several embeddings are in the block {EMBEDDING}: {', '.join(tables)}")
    if not tables:
        raise ProbeError(f"no plain [vocabulary, width] weight of a torch.nn.Embedding is in the block {EMBEDDING}")
    return next(iter(tables.items()))


def _token_ids(model: nn.Module, batch: Batch, *, shared: bool) -> Iterator[Tensor]:
    """The ids that a batch looks up, int64 [n] on the CPU; a decoder's too, where it has the embedding as well."""
    arguments = batch.kwargs
    first = next(iter(inspect.signature(model.forward).parameters), "")
    ids = arguments.get("input_ids", arguments.get(first))
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ProbeError("a batch has no input_ids")
    yield _unmasked(ids, arguments.get("attention_mask"))
    if shared and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        yield _unmasked(_decoder_ids(model, arguments), arguments.get("decoder_attention_mask"))


def _decoder_ids(model: nn.Module, arguments: Mapping[str, object]) -> Tensor:
    given, labels = arguments.get("decoder_input_ids"), arguments.get("labels")
    if isinstance(given, Tensor):
        return given
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    shifted = shift(labels=labels) if callable(shift) and isinstance(labels, Tensor) else None
    if not isinstance(shifted, Tensor):
        raise ProbeError("a batch has no decoder_input_ids, and the decoder shares the embedding")
    return shifted


def _unmasked(ids: Tensor, mask: object) -> Tensor:
    ids = ids.detach().cpu().long()
    return (ids[mask.cpu() != 0] if isinstance(mask, Tensor) and mask.shape == ids.shape else ids).reshape(-1)
