"""The file of a point: nothing that was written is lost, nothing that was damaged is believed."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from s2d2_lmeval.decoding.generation import ACCEPTED, RESAMPLED, Step
from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.harness.identity import of_plain
from s2d2_lmeval.harness.prompts import Prompt
from s2d2_lmeval.harness.responses import TracedResponse
from s2d2_lmeval.studies.store import (
    SUMMED,
    PointStore,
    decided_tokens,
    decode_line,
    decoding_order,
    encode_line,
    read_point,
    write_whole,
)


def prompt(document: int, occurrence: int = 0, **gen_kwargs: object) -> Prompt:
    return Prompt(0, "text", dict(gen_kwargs), [1, 2], 77 + document, "task", document, occurrence)


def response(text: str) -> TracedResponse:
    return TracedResponse(text, {"new_tokens": 4, "nfe": 2, "seconds": 0.1})


STEPS = [
    Step("draft", 2, [9, 9], [1, 2], [9, 9], [0, 0]),
    Step("verify", 2, [9, 9], [1, 2], [1, 3], [ACCEPTED, RESAMPLED], drafted=[2, 3]),
]


NAME = of_plain({})
"""Of the file of a point with this definition."""


def begin(store: PointStore) -> PointStore:
    store.begin({}, "a point")
    store.begin_segment(environment={}, rows=4, decoding=None)
    store.decoding_begins()
    return store


def fill(path: Path, count: int = 5) -> None:
    with PointStore(path) as store:
        begin(store)
        store.token_text = "<{}>".format
        for document in range(count):
            store.add(prompt(document), response(f"answer {document} \u2028 ü"), STEPS)


def test_responses_come_back_with_their_statistics(tmp_path: Path) -> None:
    fill(tmp_path / NAME)
    with PointStore(tmp_path / NAME) as store:
        found = store.find(prompt(3))
        assert found == "answer 3 \u2028 ü"
        assert found is not None
        assert found.stats == response("").stats
        others = [prompt(9), prompt(3, occurrence=1), prompt(3, top_k=5)]
        assert [store.find(other) for other in others] == [None] * 3
        sample = store.record.samples[prompt(0).name]
        assert sample["accepted"] == [1]
        assert sample["order"] == [[2, 1, ACCEPTED], [3, 1, RESAMPLED]]
        assert sample["pieces"] == ["<1>", "<3>"]
        assert store.record.samples[prompt(4).name]["order"] is None


def test_an_order_ends_with_the_answer() -> None:
    assert decoding_order(STEPS, 3) == [[2, 1, ACCEPTED]]
    assert decided_tokens(STEPS, 3) == [1]


def test_seconds_of_segments_add_up(tmp_path: Path) -> None:
    with PointStore(tmp_path / NAME) as store:
        for segment, elapsed in ((0, 1.0), (0, 3.0), (1, 2.0)):
            if segment == len(store.record.segments):
                begin(store)
            content = {"stats": {"new_tokens": 10}, "text": "", "accepted": [], "order": None}
            store.append("sample", name=str(elapsed), segment=segment, elapsed=elapsed, **content)
    record = read_point(tmp_path / NAME)
    assert (record.decoding_seconds, record.total("new_tokens")) == (5.0, 30)
    sample = record.samples["1.0"]
    assert decode_line(encode_line(sample)) == sample
    for count in SUMMED:
        assert decode_line(encode_line({**sample, "stats": {count: "many"}})) is None


def test_a_write_that_was_cut_short_is_skipped_and_stays(tmp_path: Path) -> None:
    path = tmp_path / NAME
    fill(path)
    whole = path.read_bytes()
    for cut in random.Random(1).sample(range(1, len(whole)), 40):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].split(b"\n")
        complete = sum(decode_line(line) is not None for line in lines)
        torn = int(bool(lines[-1]) and decode_line(lines[-1]) is None)
        with PointStore(path) as store:
            record = store.record
            found = bool(record.point) + len(record.segments) + len(record.samples)
            assert (found, len(record.unreadable)) == (complete, torn)
            begin(store)
        assert path.read_bytes().startswith(whole[:cut])
        again = read_point(path)
        assert len(again.samples) == len(record.samples)
        assert list(again.segments) == list(range(len(record.segments)))
        assert len(again.unreadable) == torn


def test_damage_in_the_middle_costs_one_line(tmp_path: Path) -> None:
    path = tmp_path / NAME
    fill(path)
    lines = path.read_bytes().split(b"\n")
    lines[3] = lines[3].replace(b"answer 1", b"answer 7")
    path.write_bytes(b"\n".join(lines))
    record = read_point(path)
    assert record.unreadable == [4]
    assert len(record.samples) == 4
    with PointStore(path) as store:
        assert store.find(prompt(1)) is None
        begin(store).add(prompt(1), response("answer 1"), ())
    assert len(read_point(path).samples) == 5


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"kind":"x"}', b'{"kind":"x","check":"0"}', b"\xff", b"{"])
def test_what_is_no_line(data: bytes) -> None:
    assert decode_line(data) is None


def test_lines_survive_whatever_a_model_writes() -> None:
    line = {"kind": "point", "definition": {}, "text": '\n\r\x00\u2028\ud83d\ude00\\"', "value": 0.1, "big": 10**30}
    line["text"] = line["text"].encode("utf-16", "surrogatepass").decode("utf-16")
    data = encode_line(line)
    assert data.count(b"\n") == 1
    assert decode_line(data) == line


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with PointStore(tmp_path / NAME), pytest.raises(StudyError, match="another process"):
        PointStore(tmp_path / NAME)


FULL_DISK = """
import resource, sys
from pathlib import Path
from s2d2_lmeval.studies.store import PointStore, StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
store = PointStore(Path(sys.argv[1]))
store.append("point", definition={})
store.begin_segment(environment={}, rows=4, decoding=None)
content = {"stats": {}, "accepted": [], "order": None, "segment": 0, "elapsed": 0.0}
try:
    for number in range(100):
        store.append("sample", name=str(number), text="x" * 50, **content)
except StorageError as error:
    print(error)
"""


def test_a_full_disk_stops_with_a_message_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write fails half way."""
    assert resource.RLIMIT_FSIZE
    path = tmp_path / NAME
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert "make room, and start again" in done.stdout
    record = read_point(path)
    assert len(record.samples) >= 5
    assert [sample["text"] for sample in record.samples.values()] == ["x" * 50] * len(record.samples)
    with PointStore(path) as store:
        begin(store).add(prompt(9), response("next"), ())
    assert len(read_point(path).samples) == len(record.samples) + 1


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.json"
    write_whole(path, "one")
    write_whole(path, "two")
    assert path.read_text() == "two"
    with pytest.raises(StudyError, match="cannot write"):
        write_whole(path / "below", "three")
    assert list(path.parent.iterdir()) == [path]
