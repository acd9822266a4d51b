"""Neuron sets: the result file's cells, and which sets a generation run blocks."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import InputError
from utils.neuron_sets import (
    RESULT_COLUMNS,
    NeuronSet,
    Result,
    check_neurons,
    format_neurons,
    most_frequent_neurons,
    most_frequent_neurons_per_layer,
    most_frequent_sets,
    parse_neurons,
    random_neurons,
    read_results,
    result_cells,
    size,
)

neuron_sets = st.lists(st.lists(st.integers(0, 1279), unique=True, max_size=8), max_size=9)
WIDTHS = [320, 320, 640, 640, 1280, 1280, 1280]


# Cells.


@given(neurons=neuron_sets)
def test_text_form_round_trips_sorted(neurons: NeuronSet) -> None:
    ordered = [sorted(layer) for layer in neurons]
    assert parse_neurons(format_neurons(neurons), where="cell") == ordered
    assert parse_neurons(str(neurons), where="cell") == ordered, "the release's form"
    assert format_neurons(neurons) == format_neurons(ordered)


def test_forms_that_are_read() -> None:
    expected = [[507, 517], [], [3]]
    for text in ("[[507, 517], [], [3]]", "[[517,507],[],[3]]", " [[507, 517], [ ], [3]] "):
        assert parse_neurons(text, where="cell") == expected
    assert format_neurons(expected) == "[[507, 517], [], [3]]"


BAD_CELLS = [
    ("cut off", "[[1, 2], [3", "not a list of lists of neurons"),
    ("code", "__import__('os').getcwd()", "not a list of lists of neurons"),
    ("nan", "nan", "not a list of lists of neurons"),
    ("a number", "7", "not a list of lists"),
    ("a dict", '{"0": [1]}', "not a list of lists"),
    ("a flat list", "[1, 2]", "not a list of lists"),
    ("a negative index", "[[1], [-1]]", "layer 1 holds something other than whole numbers"),
    ("a fraction", "[[1.0]]", "layer 0 holds something other than whole numbers"),
    ("true", "[[true]]", "layer 0 holds something other than whole numbers"),
    ("text", '[["1"]]', "layer 0 holds something other than whole numbers"),
    ("nested deeper", "[[[1]]]", "layer 0 holds something other than whole numbers"),
    ("nested without end", "[" * 100_000, "not a list of lists of neurons"),
    ("a number without end", f"[[{'9' * 5000}]]", "not a list of lists of neurons"),
    ("a neuron twice", "[[], [4, 9, 4]]", "layer 1 names neuron 4 twice"),
]


@pytest.mark.parametrize(
    ("text", "reason"), [c[1:] for c in BAD_CELLS], ids=[c[0] for c in BAD_CELLS]
)
def test_bad_cell_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        parse_neurons(text, where="file.csv: row 3")
    assert str(caught.value).startswith("file.csv: row 3") and "\n" not in str(caught.value)


def test_sets_are_checked_against_the_models_widths() -> None:
    check_neurons([[319], [], [639], [], [], [], [1279]], WIDTHS, where="x")
    with pytest.raises(InputError, match="6 layers, but the model has 7"):
        check_neurons([[]] * 6, WIDTHS, where="x")
    with pytest.raises(InputError, match=r"neuron 320 of layer 1 is out of range.* 0 to 319"):
        check_neurons([[], [5, 320], [], [], [], [], []], WIDTHS, where="x")


# Result files.

MEMORIZED = Result(4, "a; b", "http://x", [[1], [2, 3]], 0.4213579, [[], [3]], 0.4279999)
NOT_MEMORIZED = Result(5, "NA", "", [[], []], 0.0, [[], []], 0.0)
UNDECIDED = Result(6, 'say "no"', "", None, None, None, None)


def write(path: Path, *rows: list[object], columns: tuple[str, ...] = RESULT_COLUMNS) -> Path:
    from utils.files import write_table

    write_table(path, columns, rows)
    return path


def test_rows_round_trip(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.csv", *(result_cells(r) for r in (MEMORIZED, NOT_MEMORIZED, UNDECIDED))
    )
    results = read_results(path, widths=[2, 4])
    assert [r.row for r in results] == [4, 5, 6]
    assert [r.caption for r in results] == ["a; b", "NA", 'say "no"']
    assert results[0].initial == [[1], [2, 3]] and results[0].refined == [[], [3]]
    assert (results[0].initial_score, results[0].refined_score) == (0.421358, 0.428)
    assert [r.memorized for r in results] == [True, False, False]
    assert results[2].initial is results[2].refined is results[2].initial_score is None
    assert results[1].initial == [[], []] and results[1].initial_score == 0.0


def test_cells_have_six_digits_and_undecided_ones_are_empty() -> None:
    assert result_cells(MEMORIZED) == [
        "a; b",
        "http://x",
        "[[1], [2, 3]]",
        "0.421358",
        "[[], [3]]",
        "0.428000",
        4,
    ]
    assert result_cells(NOT_MEMORIZED)[2:6] == ["[[], []]", "0.000000"] * 2
    assert result_cells(UNDECIDED)[2:6] == [""] * 4


def test_the_releases_files_are_read_by_position(tmp_path: Path) -> None:
    """Six columns, Python lists, scores in full precision."""
    path = tmp_path / "theirs.csv"
    path.write_text(
        "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM\n"
        "The No Limits;http://a;[[9, 3], [], [507]];0.41264545917510986;[[], [], [507]];0.4275\n"
        "Another one;http://b;[[], [], []];0;[[], [], []];0\n"
    )
    results = read_results(path, widths=[320, 320, 640])
    assert [(r.row, r.initial) for r in results] == [
        (0, [[3, 9], [], [507]]),
        (1, [[], [], []]),
    ]
    assert results[0].initial_score == 0.41264545917510986
    assert [r.memorized for r in results] == [True, False]


def test_a_memorized_prompt_may_have_no_neurons() -> None:
    """No neuron stands out, and nothing switched off gives a score of 1."""
    none: NeuronSet = [[], []]
    assert Result(0, "a", "", none, 1.0, none, 1.0).memorized
    assert not Result(0, "a", "", none, 0.0, none, 0.0).memorized
    assert not Result(0, "a", "", None, None, None, None).memorized


GOOD_ROW = ["caption", "url", "[[1], []]", "0.5", "[[], []]", "0.4", "0"]
BAD_ROWS = [
    ("a layer less in one cell", {4: "[[]]"}, "rows with 1 and 2 layers"),
    ("a neuron out of range", {2: "[[2], []]"}, "neuron 2 of layer 0 is out of range"),
    ("a score that is text", {3: "high"}, "'high' is not a number"),
    ("a score that is NaN", {5: "nan"}, "the score is nan"),
    ("one of four cells empty", {3: ""}, "'' is not a number"),
    ("an empty set only", {2: ""}, "'' is not a list of lists"),
    ("a row number that is no number", {6: "x"}, "'x' in column 'Row'"),
    ("a negative row number", {6: "-1"}, "'-1' in column 'Row'"),
    ("a row number of thousands of digits", {6: "9" * 5000}, "in column 'Row'"),
    ("a row number in other digits", {6: "٣"}, "in column 'Row' is not a whole number"),
]


@pytest.mark.parametrize(
    ("change", "reason"), [c[1:] for c in BAD_ROWS], ids=[c[0] for c in BAD_ROWS]
)
def test_bad_result_row_is_refused(tmp_path: Path, change: dict[int, str], reason: str) -> None:
    widths = None if "layers" in reason else [2, 2]
    read_results(write(tmp_path / "good.csv", GOOD_ROW), widths=widths)
    cells = [change.get(column, cell) for column, cell in enumerate(GOOD_ROW)]
    with pytest.raises(InputError, match=reason):
        read_results(write(tmp_path / "bad.csv", cells), widths=widths)


def test_bad_result_files_are_refused(tmp_path: Path) -> None:
    twice = write(tmp_path / "twice.csv", GOOD_ROW, GOOD_ROW)
    with pytest.raises(InputError, match="'Row' 0 appears twice"):
        read_results(twice)
    column = write(tmp_path / "column.csv", columns=("Caption", "URL", "Initial Neurons"))
    with pytest.raises(InputError, match="no column 'Initial SSIM'"):
        read_results(column)
    cut = write(tmp_path / "cut.csv", GOOD_ROW)
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(InputError, match="last row is cut off"):
        read_results(cut)


# Which sets are blocked.

SETS: list[NeuronSet] = [
    [[1, 2], [5], []],
    [[1], [5, 6], []],
    [[1, 3], [], []],
    [[1], [5, 6], []],
    [[], [], []],
]


def test_size() -> None:
    assert [size(neurons) for neurons in SETS] == [3, 3, 2, 3, 0]


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, [[1], [], []]),  # four times
        (2, [[1], [5], []]),  # three times
        (3, [[1], [5, 6], []]),  # twice
        (4, [[1, 2], [5, 6], []]),  # 2 and 3 once each: the lower index
        (5, [[1, 2, 3], [5, 6], []]),
    ],
)
def test_most_frequent_neurons(k: int, expected: NeuronSet) -> None:
    assert most_frequent_neurons(SETS, k) == expected
    assert most_frequent_neurons(SETS[::-1], k) == expected, "the file's order plays no role"


def test_most_frequent_neurons_per_layer() -> None:
    assert most_frequent_neurons_per_layer(SETS, 1) == [[1], [5], []]
    assert most_frequent_neurons_per_layer(SETS, 2) == [[1, 2], [5, 6], []]
    assert most_frequent_neurons_per_layer(SETS, 3) == [[1, 2, 3], [5, 6], []]


def test_most_frequent_sets() -> None:
    assert most_frequent_sets(SETS, 1) == [[1], [5, 6], []]
    # Both others occur once; the union counts shared neurons once.
    assert most_frequent_sets(SETS, 2) == [[1, 2], [5, 6], []]
    assert most_frequent_sets(SETS, 3) == [[1, 2, 3], [5, 6], []]
    assert most_frequent_sets(SETS[::-1], 2) == [[1, 2], [5, 6], []]


@pytest.mark.parametrize(
    ("function", "k", "reason"),
    [
        (most_frequent_neurons, 6, "only 5 different neurons were located, 6 asked for"),
        (most_frequent_neurons_per_layer, 4, "no layer has more than 3 located neurons"),
        (most_frequent_sets, 4, "only 3 different neuron sets were located, 4 asked for"),
    ],
)
def test_more_than_there_are_is_refused(function, k: int, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        function(SETS, k)
    with pytest.raises(InputError):
        function([], 1)


@given(
    like=st.lists(st.lists(st.integers(0, 11), unique=True, max_size=4), min_size=3, max_size=3),
    located=st.lists(
        st.lists(st.lists(st.integers(0, 11), unique=True, max_size=3), min_size=3, max_size=3),
        max_size=3,
    ),
    seed=st.integers(0, 1000),
)
def test_random_neurons_are_as_many_in_the_same_layers_and_never_located(
    like: NeuronSet, located: list[NeuronSet], seed: int
) -> None:
    widths = [12, 14, 30]
    taken = [{i for neurons in located for i in neurons[layer]} for layer in range(3)]
    if any(len(like[l]) > widths[l] - len(taken[l]) for l in range(3)):
        with pytest.raises(InputError, match="random neurons asked for"):
            random_neurons(like, located, widths, random.Random(seed))
        return
    drawn = random_neurons(like, located, widths, random.Random(seed))
    assert [len(layer) for layer in drawn] == [len(layer) for layer in like]
    check_neurons(drawn, widths, where="drawn")
    for layer in range(3):
        assert drawn[layer] == sorted(set(drawn[layer]))
        assert not set(drawn[layer]) & taken[layer]
    assert drawn == random_neurons(like, located, widths, random.Random(seed))


def test_random_neurons_differ_by_seed_and_leave_the_global_generator_alone() -> None:
    like: NeuronSet = [[0, 1, 2, 3, 4]]
    random.seed(1)
    state = random.getstate()
    drawn = {str(random_neurons(like, [like], [500], random.Random(s))) for s in range(10)}
    assert len(drawn) == 10 and random.getstate() == state


def test_random_neurons_where_exactly_enough_are_left() -> None:
    like: NeuronSet = [[0, 1]]
    assert random_neurons(like, [[[0, 1]]], [4], random.Random(0)) == [[2, 3]]
    with pytest.raises(InputError, match="layer 0: 2 random neurons asked for, but only 1"):
        random_neurons(like, [[[0, 1]]], [3], random.Random(0))
