"""Tensors within nested values."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from transformers import BatchEncoding, BatchFeature
from transformers.modeling_outputs import CausalLMOutput

from sharpwatch.curvature.objective.nested import map_tensors, tensors


class Pair(NamedTuple):
    x: torch.Tensor
    y: object


@dataclass
class Record:
    x: torch.Tensor
    more: object
    made: int = field(init=False, default=3)


@dataclass(frozen=True, slots=True)
class FrozenRecord:
    x: torch.Tensor
    more: object = None


class Attributes(dict):
    """A dict whose items are attributes as well, as in many configurations."""

    __getattr__ = dict.__getitem__


class Items(Mapping):
    def __init__(self, items):
        self._items = dict(items)

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


ONE, TWO = torch.ones(2), torch.full((2,), 2.0)
NESTS = {
    "tensor": ONE,
    "list": [ONE, "text", None],
    "tuple": (ONE, (TWO,)),
    "named tuple": Pair(ONE, [TWO]),
    "dict": {"a": ONE, "b": {"c": TWO}},
    "OrderedDict": OrderedDict(a=ONE),
    "UserDict": UserDict(a=ONE, b=UserDict(c=TWO)),
    "BatchEncoding": BatchEncoding({"input_ids": ONE}),
    "BatchFeature": BatchFeature({"pixel_values": ONE, "more": [TWO]}),
    "ModelOutput": CausalLMOutput(loss=ONE, logits=TWO),
    "attributes": Attributes(a=ONE),
    "mapping": Items({"a": ONE, "b": Items({"c": TWO})}),
    "dataclass": Record(ONE, [TWO]),
    "frozen dataclass": FrozenRecord(ONE, FrozenRecord(TWO)),
    "nothing": None,
}


@pytest.mark.parametrize("kind", NESTS)
def test_a_nest_is_mapped_to_a_new_one_of_its_kind(kind):
    nest = NESTS[kind]
    before = list(tensors(nest))
    mapped = map_tensors(nest, lambda tensor, _: tensor + 1)
    assert type(mapped) is type(nest)
    assert [each.tolist() for each in tensors(mapped)] == [(each + 1).tolist() for each in before]
    assert all(one is other for one, other in zip(tensors(nest), before, strict=True))
    assert len(before) == sum(each is ONE or each is TWO for each in before)
    assert len(before) > 0 or kind == "nothing"


def test_what_is_not_a_tensor_stays():
    mapped = map_tensors(NESTS["list"], lambda tensor, _: tensor)
    assert mapped[1:] == ["text", None]
    assert map_tensors(NESTS["dataclass"], lambda tensor, _: tensor).made == 3
    assert map_tensors(NESTS["BatchFeature"], lambda tensor, _: tensor * 3).pixel_values.tolist() == [3.0, 3.0]


def test_a_change_is_told_the_nearest_name():
    names = []
    map_tensors({"a": [ONE, {"b": TWO}], "c": Record(ONE, (TWO,))}, lambda tensor, name: names.append(name) or tensor)
    assert names == ["a", "b", "x", "more"]


def test_a_value_that_contains_itself_comes_to_an_end():
    nest = {"a": ONE}
    nest["self"] = nest
    assert next(tensors(nest)) is ONE
    assert len(list(tensors(nest))) < 100
    assert map_tensors(nest, lambda tensor, _: tensor)["a"] is ONE
