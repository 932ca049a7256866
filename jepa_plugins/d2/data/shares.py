"""Shares of registered data sets for training on few images; which images, says `jepa_plugins.core.subsets`."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from jepa_plugins.core.subsets import share_of, share_size, stem_of

_SHARE = re.compile(r"(?P<base>.+)@(?P<percent>[^@%]*)%")


class Share(NamedTuple):
    """`percent` of the registered data set `base`."""

    base: str
    percent: str


def parse_share(name: str) -> Share | None:
    """The share that a name NAME@P% asks for; None for a name of another form.

    Raises:
        ValueError: P is no number above 0 and up to 100.
    """
    found = _SHARE.fullmatch(name)
    if not found:
        return None
    try:
        share_size(1, found["percent"])
    except ValueError as error:
        raise ValueError(f"Data set '{name}': {error}") from error
    return Share(found["base"], found["percent"])


def _metadata_of(name: str) -> dict[str, Any]:
    own = ("name", "share_of")
    return {key: value for key, value in MetadataCatalog.get(name).as_dict().items() if key not in own}


def register_share(name: str, share: Share) -> None:
    """Register a share of a data set that is registered; the records are those of its images, in their order.

    Its metadata are those of the whole, and ``share_of``, the name of the whole.
    """

    def load() -> list[dict[str, Any]]:
        records = DatasetCatalog.get(share.base)
        kept = set(share_of((stem_of(record["file_name"]) for record in records), share.percent))
        MetadataCatalog.get(name).set(**_metadata_of(share.base))  # detectron2 learns some while it loads
        return [record for record in records if stem_of(record["file_name"]) in kept]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(share_of=share.base, **_metadata_of(share.base))
