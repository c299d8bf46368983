"""The JSON schema that ships for editors is the one of the configuration that is read."""

from __future__ import annotations

import json
from pathlib import Path

import sharpwatch.daemon.config
from sharpwatch.daemon.config.load import json_schema

SHIPPED = Path(sharpwatch.daemon.config.__file__).with_name("schema.json")


def test_the_shipped_schema_is_up_to_date():
    assert json.loads(SHIPPED.read_text(encoding="utf-8")) == json_schema()


def test_it_names_every_key_and_its_limits():
    schema = json_schema()
    daemon, guard, action = (schema["$defs"][f"{name}Config"]["properties"] for name in ("Daemon", "Guard", "Action"))
    assert daemon["queue_capacity"] == {"default": 4096, "maximum": 1_000_000, "minimum": 16} | {
        key: daemon["queue_capacity"][key] for key in ("title", "type")
    }
    assert guard["min_multiplier"]["exclusiveMinimum"] == 0.0
    assert action["kind"]["enum"] == ["notify", "scale_lr", "rollback"]
    assert schema["additionalProperties"] is False
