"""A cache that a container's image holds: an overlay cannot rename or stamp all that is below."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import MiB
from subject import s3c

pytestmark = pytest.mark.root

LARGE = 6 * MiB  # more than there is room for a copy
Layer = Callable[[], Path]


@pytest.fixture
def image(tmp_path: Path, publish: Callable[..., str]) -> Path:
    """A cache of last week with an object and a tree of two files."""
    place = tmp_path / "image"
    uris = [publish(bytes(LARGE), "large"), publish(b"{}", "tree/a"), publish(b"[]", "tree/b")]
    for uri in (uris[0], os.path.dirname(uris[1]) + "/"):
        s3c.get_local_path_for_resource(uri, cache_dir=place)
    for path in place.rglob("*"):
        os.utime(path, (time.time() - 7 * 86400,) * 2)
    return place


@pytest.fixture
def layer(image: Path, mount: Any) -> Layer:
    """`layer()` mounts a writable layer of 4 MiB over the image."""

    def layer() -> Path:
        room = mount("size=4m")
        for name in ("upper", "work"):
            (room / name).mkdir()
        options = f"lowerdir={image},upperdir={room}/upper,workdir={room}/work"
        place: Path = mount(options, "overlay", "overlay")
        return place

    return layer


def test_what_an_image_holds_is_pruned(layer: Layer) -> None:
    manager = s3c.CacheManager(layer())
    gone = manager.prune(max_age_days=1)
    assert sorted(entry.kind for entry in gone) == ["object", "object", "object", "tree"]
    assert manager.entries() == []


def test_a_tree_of_an_image_that_lost_a_file_is_made_anew(
    image: Path, layer: Layer, publish: Callable[..., str]
) -> None:
    (lost,) = image.rglob("trees/*/b")
    lost.unlink()
    uri = os.path.dirname(publish(b"[]", "tree/b")) + "/"
    tree = s3c.get_local_path_for_resource(uri, cache_dir=layer())
    assert sorted(path.name for path in tree.path.iterdir()) == ["a", "b"]


def test_a_hit_of_an_image_is_fresh_after_it_though_it_cannot_be_stamped(
    layer: Layer, publish: Callable[..., str]
) -> None:
    uri, place = publish(bytes(LARGE), "large"), layer()
    found = [s3c.get_local_path_for_resource(uri, cache_dir=place, max_age=60) for _ in range(2)]
    assert [one.status for one in found] == ["revalidated", "fresh"]
