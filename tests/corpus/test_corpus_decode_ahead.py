"""Results of background threads: in order, never too many at once, errors where they belong."""

from __future__ import annotations

import threading

import pytest

from mmtok.corpus.decode_ahead import DecodeAhead, Refused
from mmtok.corpus.records import Sample


def reading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("mmtok-")]


def test_results_come_in_order_and_errors_in_their_turn():
    def decode(sample):
        if sample.key == "4":
            raise ImportError("no decoder")
        threading.Event().wait(0.002 * (5 - int(sample.key)))  # later ones are ready first
        return Refused(sample.key, "", 0)

    found = []
    with DecodeAhead((Sample(str(n)) for n in range(8)), decode, threads=3, items=8, bytes=1) as results:
        given = iter(results)
        for _ in range(4):
            found.append(next(given).key)
            results.release(1, 0)
        with pytest.raises(ImportError, match="no decoder"):
            next(given)
    assert found == ["0", "1", "2", "3"] and not reading_threads()


def test_an_error_of_the_source_comes_after_what_was_read():
    def source():
        yield Sample("0")
        raise ValueError("the tar is no tar")

    with DecodeAhead(source(), lambda s: Refused(s.key, "", 0), threads=1, items=2, bytes=1) as results:
        given = iter(results)
        assert next(given).key == "0"
        with pytest.raises(ValueError, match="no tar"):
            next(given)


def test_no_more_is_read_than_may_be_held():
    read = []

    def source():
        for n in range(50):
            read.append(n)
            yield Sample(str(n))

    with DecodeAhead(source(), lambda s: Refused(s.key, "", 0), threads=2, items=5, bytes=1) as results:
        given = iter(results)
        for n in range(5):
            assert next(given).key == str(n)
        threading.Event().wait(0.05)  # time in which a sixth would be read
        assert len(read) == 5
        results.release(2, 0)
        assert next(given).key == "5"
    assert len(read) <= 7 and not reading_threads()
