import itertools

import pytest

from fastcal.feed.chunks import LAST_BATCHES, Chunk, ChunkSize, Order, count_batches, log_last_batch


def batches_of(samples, batch_size, broken=(), ahead=1):
    """Go through a pass as a feed does with so many chunks under way, where the broken samples turn out to be so."""
    unreadable, under_way, batches = samples._unreadable, [], [[]]
    while True:
        while len(under_way) < ahead and (chunk := samples.next_chunk()):
            under_way.append(chunk)
        if not under_way:
            return [batch for batch in batches if batch]
        bad = set(under_way[0].numbers) & set(broken)
        if bad:
            unreadable |= bad
            samples.go_back(under_way[0])
            under_way.clear()
            continue
        chunk = under_way.pop(0)
        assert chunk.filled == len(batches[-1]) % batch_size
        if len(batches[-1]) == batch_size:
            batches.append([])
        batches[-1] += chunk.numbers


def expected(good, batch_size, last_batch):
    full, over = divmod(len(good), batch_size)
    row = list(itertools.islice(itertools.cycle(good), (full + (last_batch == "wrap" and over > 0)) * batch_size))
    row = good if last_batch == "keep" else row
    return [row[first : first + batch_size] for first in range(0, len(row), batch_size)]


@pytest.mark.parametrize("last_batch", LAST_BATCHES)
@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 2, None])
def test_batches_are_those_of_the_readable_samples(last_batch, ahead, most):
    size = most and ChunkSize(most=most, few=1, most_bytes=10**9, size_of=lambda number: 1)
    for count in range(1, 7):
        for batch_size in range(1, 9):
            for broken in itertools.chain.from_iterable(itertools.combinations(range(count), k) for k in range(count)):
                good = [number for number in range(count) if number not in broken]
                unreadable = set()
                for _ in range(2):  # in the second pass they are known
                    samples = Order(count, batch_size, last_batch, unreadable, size)
                    found = batches_of(samples, batch_size, broken, ahead)
                    if (
                        last_batch == "drop" and broken
                    ):  # a batch that unreadable samples leave incomplete is not handed out
                        found = [batch for batch in found if len(batch) == batch_size]
                    assert found == expected(good, batch_size, last_batch)
                    assert len(found) == count_batches(count - len(unreadable), batch_size, last_batch)


def test_large_samples_make_small_chunks():
    sizes = [1, 1, 9, 9, 1, 1, 1, 1]
    samples = Order(8, 8, "wrap", set(), ChunkSize(most=4, few=2, most_bytes=10, size_of=sizes.__getitem__))
    chunks = []
    while chunk := samples.next_chunk():
        chunks.append(chunk.numbers)
    assert chunks == [[0, 1], [2, 3], [4, 5, 6, 7]]


def test_a_chunk_says_where_it_began():
    samples = Order(3, 2, "wrap", {1}, None)
    assert samples.next_chunk() == Chunk([0, 2], 0, 0)
    assert samples.next_chunk() is None


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (8, []),
        (10, ["10 images in batches of 4: the last is completed with the first 2"]),
        (3, ["3 images in batches of 4: the last is completed with the first 1"]),
        (1, ["1 image in batches of 4: repeated to complete one"]),
    ],
)
def test_it_says_how_the_last_batch_is_completed(caplog, count, said):
    caplog.set_level("INFO", "fastcal")
    log_last_batch(count, 4, "wrap", "image")
    assert caplog.messages == said
