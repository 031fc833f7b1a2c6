"""A batch on a real Dask cluster of processes that share one cache directory: `nox -s cluster`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import BUCKET
from server import Server
from subject import name as subject_name
from subject import s3c

distributed = pytest.importorskip("distributed")

# What a cluster warns of at start and end is no concern of these tests.
pytestmark = pytest.mark.filterwarnings("ignore:::")
WORKERS = 3


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a cluster with processes of its own, no dashboard."""
    folder = tmp_path_factory.mktemp("dask")
    root = str(Path(str(s3c.__file__)).resolve().parents[subject_name.count(".")])
    tests = str(Path(__file__).resolve().parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([root, tests]))
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # until a test says otherwise
        patch.chdir(folder)
        with (
            distributed.LocalCluster(
                n_workers=WORKERS,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                local_directory=str(folder),
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client


@pytest.fixture
def get_all(client: Any, server: Server, cache: Path) -> Callable[..., Any]:
    """`get_all(uris, **options)` on the cluster; its workers see this test's endpoint."""
    told = {"AWS_ENDPOINT_URL": server.url, "no_proxy": "*"}
    client.run(lambda: os.environ.update(told))  # `os.environ` itself would travel as a copy

    def get_all(uris: Any, **options: Any) -> Any:
        return s3c.get_local_paths_for_resources(
            uris, executor=client.get_executor(), **{"cache_dir": cache, **options}
        )

    return get_all


@pytest.fixture
def uris(server: Server) -> list[str]:
    for number in range(200):
        server.put(BUCKET, f"many/{number}.txt", b"%d" % number)
    return [f"s3://{BUCKET}/many/{number}.txt" for number in range(200)]


def test_results_come_in_order_and_each_object_once(
    server: Server, uris: list[str], get_all: Callable[..., Any], client: Any
) -> None:
    results = get_all([*uris, *uris[:20]])
    assert [int(r.path.read_bytes()) for r in results] == [*range(200), *range(20)]
    assert {r.status for r in results} == {"downloaded"}
    asked = Counter(request.path for request in server.seen)
    assert len(asked) == 200
    assert set(asked.values()) == {1}


def test_the_work_is_done_by_the_workers(
    server: Server, uris: list[str], get_all: Callable[..., Any]
) -> None:
    server.latency = 0.01
    get_all(uris)
    assert 2 <= server.connections <= WORKERS


def test_the_cache_is_shared_with_this_process(
    server: Server, uris: list[str], get_all: Callable[..., Any], cache: Path
) -> None:
    results = get_all(uris)
    server.reset()
    here = s3c.get_local_paths_for_resources(uris, cache_dir=cache, max_age=60)
    assert [r.path for r in here] == [r.path for r in results]
    assert server.seen == []
    assert {r.status for r in get_all(uris)} == {"revalidated"}


def test_a_large_object_that_all_workers_ask_for_comes_once(
    server: Server, client: Any, get_all: Callable[..., Any], cache: Path
) -> None:
    data = os.urandom(20 << 20)
    server.put(BUCKET, "large.bin", data)
    server.rate = 20e6
    uri = f"s3://{BUCKET}/large.bin"
    options = {"cache_dir": cache}
    get = s3c.get_local_path_for_resource
    futures = [client.submit(get, uri, **options, pure=False) for _ in range(WORKERS)]
    results = client.gather(futures)
    assert {r.path.read_bytes() for r in results} == {data}
    assert len({r.path for r in results}) == 1
    # Each process asks at once, so up to 8 MiB are on their way to each before one is ahead.
    assert server.bytes_sent <= len(data) + (WORKERS - 1) * (9 << 20)


def test_errors_arrive_as_our_classes(
    server: Server, uris: list[str], get_all: Callable[..., Any]
) -> None:
    server.delete(BUCKET, "many/7.txt")
    results = get_all(uris[:10], return_exceptions=True)
    assert [type(r) is s3c.LocalizedResource for r in results].count(False) == 1
    error = results[7]
    assert (isinstance(error, s3c.NotFoundError), isinstance(error, OSError)) == (True, True)
    assert (error.code, error.status, error.uri) == ("NoSuchKey", 404, uris[7])


def test_the_first_error_is_raised_here(
    server: Server, uris: list[str], get_all: Callable[..., Any]
) -> None:
    server.delete(BUCKET, "many/7.txt")
    with pytest.raises(s3c.NotFoundError, match=r"many/7\.txt"):
        get_all(uris[:10])


def test_trees_come_from_a_cluster_too(
    server: Server, uris: list[str], get_all: Callable[..., Any]
) -> None:
    (result,) = get_all([f"s3://{BUCKET}/many/"])
    assert len(os.listdir(result)) == 200


def test_a_client_cannot_travel(
    server: Server, uris: list[str], get_all: Callable[..., Any]
) -> None:
    with pytest.raises(TypeError, match="s3_client"):
        get_all(uris, s3_client=open(os.devnull))  # noqa: SIM115 - like a client, it holds a file
    assert server.seen == []


def test_progress_is_told_of_what_the_cluster_brought(
    server: Server, uris: list[str], get_all: Callable[..., Any]
) -> None:
    got: list[int] = []
    results = get_all(uris, progress=got.append)
    assert sum(got) == sum(r.size for r in results)
