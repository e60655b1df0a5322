"""YAML of strangers: plain values, of a size that is bounded after aliases are written out."""

from __future__ import annotations

from typing import Any, Final

import yaml

_MOST_NBYTES: Final = 1 << 20
"""Over thirty times what a model of 162 blocks needs."""
_MOST_NODES: Final = 100_000
"""Scalars, lists and mappings, each counted as often as it occurs; a run's file has hundreds."""

_DIGITS: Final = 22
"""Characters of an integer, with sign and prefix."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Counts what aliases stand for, which can be a billion (`billion laughs`).

    And refuses what PyYAML takes: keys that are there twice, of which the last would count, and
    integers of more than 64 bits, whose hashes can all be one.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - as the base class
        event, before = self.peek_event(), self._nodes
        is_alias = isinstance(event, yaml.AliasEvent)
        self._nodes += self._sizes.get(event.anchor, 1) if is_alias else 1
        if self._nodes > _MOST_NODES:
            raise ValueError(f"more than {_MOST_NODES} values, aliases written out")
        node = super().compose_node(parent, index)
        if event.anchor is not None and not is_alias:
            self._sizes[event.anchor] = self._nodes - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:  # noqa: ANN401 - as the base class
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise ValueError("a key is there twice")
        return node

    def construct_yaml_int(self, node: Any) -> int:  # noqa: ANN401 - as the base class
        if len(node.value) > _DIGITS:
            raise ValueError("an integer of more than 64 bits")
        found: int = super().construct_yaml_int(node)
        return found


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(data: bytes) -> Any:  # noqa: ANN401 - YAML
    """Parse one document of UTF-8 into plain values; tags that name Python's objects are refused.

    Raises:
        ValueError: Not such a document, or one of more than 1 MiB.
    """
    if len(data) > _MOST_NBYTES:
        raise ValueError(f"{len(data)} bytes of YAML")
    try:
        return yaml.load(data.decode("utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, LookupError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(str(error)) from None
