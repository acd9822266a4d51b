"""Tables, prompt files and atomic writes."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils import files
from utils.errors import InputError
from utils.files import FloatRows, Prompt, append_row, open_table, read_prompts, read_table

COLUMNS = ("Caption", "URL", "Row")
# Whatever UTF-8 can hold, and more often what a table can trip over.
TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from('";\n\r,\t\0 \ufeff')))
ROWS = st.lists(st.tuples(TEXT, TEXT, st.integers(0, 99).map(str)), max_size=5)
ANY_FOLDER = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def table_of(path: Path, rows: list[tuple[str, ...]]) -> bytes:
    path.unlink(missing_ok=True)
    open_table(path, COLUMNS)
    for row in rows:
        append_row(path, row)
    return path.read_bytes()


@ANY_FOLDER
@given(rows=ROWS)
def test_any_text_survives_a_table(rows: list[tuple[str, ...]], tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    written = table_of(path, rows)
    header, table = read_table(path)
    assert header == list(COLUMNS)
    assert [tuple(cells.values()) for cells in table] == rows
    # The same file written in one go, and read by another reader.
    files.write_table(tmp_path / "whole.csv", COLUMNS, rows)
    assert (tmp_path / "whole.csv").read_bytes() == written
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file, delimiter=";"))[1:] == [list(row) for row in rows]


@ANY_FOLDER
@given(rows=ROWS, data=st.data())
def test_a_table_cut_at_any_byte_loses_only_its_last_row(
    rows: list[tuple[str, ...]], data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    written = table_of(path, rows)
    # How many bytes each number of whole rows takes, from files that end there.
    ends = [len(table_of(path, rows[:count])) for count in range(len(rows) + 1)]
    place = data.draw(st.integers(0, len(written)))
    whole = sum(end <= place for end in ends) - 1  # -1: not even the header

    path.write_bytes(written[:place])
    found = files.read_whole_rows(path, COLUMNS)
    assert [tuple(cells.values()) for cells in found] == rows[: max(whole, 0)]
    assert path.read_bytes() == written[:place], "reading changes nothing"

    assert open_table(path, COLUMNS) == found
    for row in rows[max(whole, 0) :]:
        append_row(path, row)
    assert path.read_bytes() == written


@ANY_FOLDER
@given(captions=st.lists(TEXT.filter(str.strip), min_size=1, max_size=5), data=st.data())
def test_captions_come_back_as_they_stand_in_their_cells(
    captions: list[str], data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.csv"
    files.write_table(path, ("Index", "Text"), [(7, caption) for caption in captions])
    everything = [Prompt(row, caption) for row, caption in enumerate(captions)]
    assert read_prompts(path, caption_column="Text") == everything
    rows = data.draw(st.lists(st.integers(0, len(captions) - 1), unique=True))
    chosen = read_prompts(path, caption_column="Text", rows=rows)
    assert chosen == [everything[row] for row in sorted(rows)]


@pytest.mark.parametrize("caption", ["NA", "null", "None", "nan", "1", " padded ", "0.50", "'"])
def test_captions_that_readers_like_to_change(caption: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_bytes(f"\ufeff;Caption;URL;type\r\n0;{caption};u;VM\r\n".encode())
    assert read_prompts(path) == [Prompt(0, caption, "u", "VM")]


@pytest.mark.parametrize("missing", ["", " ", "\t\u00a0", '""'])
def test_an_empty_caption_counts_only_among_the_rows_asked_for(
    missing: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(f"Caption;URL\na;\n{missing};\nb;\n", encoding="utf-8")
    with pytest.raises(InputError, match="row 1 has an empty caption"):
        read_prompts(path)
    assert [p.caption for p in read_prompts(path, rows=[2, 0])] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "content", "says"),
    [
        ("nothing at all", b"", "empty file"),
        ("a header alone", b"Caption\n", "a header but no rows"),
        ("commas", b"Index,Caption\n1,a\n", "is the separator ';'"),
        ("a quote that is not closed", b'Caption\n"a\nb\n', "line 3"),
        ("text behind a quote", b'Caption;URL\n"a"b;c\n', "line 2"),
        ("too few cells", b"Caption;URL\na;b\nc\n", "row 1 has 1 cells, the header has 2"),
        ("too many cells", b"Caption;URL\na;b;c\n", "row 0 has 3 cells, the header has 2"),
        ("a name twice", b"URL;Caption;URL\n1;a;2\n", "'URL' appears twice"),
        ("Latin-1", "Caption\ncaf\xe9\n".encode("latin-1"), "not UTF-8 text at byte 11"),
        ("UTF-16", "Caption\na\n".encode("utf-16"), "not UTF-8 text at byte 0"),
    ],
)
def test_a_table_is_read_strictly(words: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert says in str(caught.value) and str(path) in str(caught.value)


def test_nameless_columns_may_be_several(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(";;Caption\n0;1;a\n")
    assert [p.caption for p in read_prompts(path)] == ["a"]


# Files that are replaced as a whole.


def test_what_is_replaced_is_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    files.write_bytes(path, b"first")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_bytes(b"half of the sec")
        assert path.read_bytes() == b"first" and temporary.parent == path.parent
        raise KeyboardInterrupt
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path], "no temporary file stays behind"
    temporary.write_bytes(b"what a killed run has left, longer than what follows")
    files.write_bytes(path, b"second")
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]


def test_json_survives_and_rubbish_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    content = {"b": [1.5, None, "ü\n"], "a": {"x": True}}
    files.write_json(path, content)
    assert files.read_json(path) == content and list(files.read_json(path)) == ["b", "a"]
    for rubbish in (b"", b"{", b"[1]", b"3", b"\xff", json.dumps(content).encode()[:-1]):
        path.write_bytes(rubbish)
        with pytest.raises(InputError, match=r"record\.json"):
            files.read_json(path)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        files.read_json(path)


@ANY_FOLDER
@given(
    width=st.integers(1, 5),
    values=st.lists(st.floats(width=32, allow_nan=False), max_size=30),
    cut=st.integers(0, 200),
)
def test_rows_of_numbers_cut_at_any_byte(
    width: int, values: list[float], cut: int, tmp_path: Path
) -> None:
    path = tmp_path / "below" / "rows"
    path.unlink(missing_ok=True)
    rows = np.array(values[: len(values) // width * width], dtype=np.float32).reshape(-1, width)
    table = FloatRows(path, width)
    for row in rows:
        table.add(row)
    written = path.read_bytes()
    assert written == rows.astype("<f4").tobytes() and table.count == len(rows)
    path.write_bytes(written[:cut])
    again = FloatRows(path, width)
    assert again.count == min(cut, len(written)) // (4 * width)
    for row in rows[again.count :]:
        again.add(row)
    assert path.read_bytes() == written
    if len(rows):
        assert np.array_equal(again.read(), rows)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[1]", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"record\.json: not (valid JSON|a JSON object)"):
        files.read_json(path)


def test_the_end_of_whole_rows_is_found_behind_quotes(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    open_table(path, COLUMNS)
    whole = path.read_bytes() + b'"a ""b""\nc";d;1\n' * 600
    path.write_bytes(whole + b'"half a\nrow')
    files.drop_partial_row(path)
    assert path.read_bytes() == whole


# The real files.


@pytest.mark.parametrize(
    ("name", "count", "types"),
    [
        ("memorized_laion_prompts.csv", 500, {"VM": 112, "TM": 388}),
        ("unmemorized_laion_prompts.csv", 500, {"": 500}),
        ("coco2014_val_10000.csv", 10_000, {"": 10_000}),
    ],
)
def test_the_published_prompt_files(
    name: str, count: int, types: dict[str, int], shared_laion: Path
) -> None:
    prompts = read_prompts(shared_laion / name)
    assert [prompt.row for prompt in prompts] == list(range(count))
    assert Counter(prompt.type for prompt in prompts) == types
    # Compared with a reader that knows nothing of rows or columns.
    with (shared_laion / name).open(newline="", encoding="utf-8") as file:
        table = list(csv.reader(file, delimiter=";"))
    place = table[0].index("Caption")
    assert [prompt.caption for prompt in prompts] == [cells[place] for cells in table[1:]]


def test_types_of_the_memorized_prompts(shared_laion: Path) -> None:
    prompts = read_prompts(shared_laion / "memorized_laion_prompts.csv")
    assert prompts[0] == Prompt(
        0,
        "The No Limits Business Woman Podcast",
        "https://onlinecoach1.hipcast.com/albumart/1000_1618923228.jpg",
        "VM",
    )
    assert prompts[1].type == "TM"
