"""The paper's tables: published values untouched, ours from a chain of records that holds."""

import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from paper_folder import METRICS, PROMPTS, SCORES, PaperFolder, change, sha256

from utils import paper_tables
from utils.neuron_sets import Result
from utils.paper_settings import (
    BLOCKED,
    DEFAULT,
    HOLDOUT_UNBLOCKED,
    PAPER_PROTOCOL,
    SETTINGS,
    UNBLOCKED,
    most_frequent,
)
from utils.paper_tables import (
    MEASURES,
    TITLES,
    Builder,
    published_comparisons,
    read_published,
)
from utils.search_options import THRESHOLD_FLAGS
from utils.tables import (
    Comparison,
    Measured,
    Number,
    Table,
    comparison_table,
    csv_text,
    difference,
    escape,
    latex,
    markdown,
    write_tables,
)

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "metrics/paper_tables.csv"
VALUES = ROOT / "metrics/paper_values.csv"
PUBLISHED = read_published(TABLES, VALUES)
PLAN = [
    "python 3_detect_memorized_neurons.py --version=tiny",
    "python 4_generate_images.py --version=tiny -o=generated_images/tiny_blocked",
    "python metrics/compute_sscd_gen.py -o=results/metrics_tiny/sscd_gen_blocked.csv",
    "python 4_generate_images.py --block_top_k_neurons=5 -o=generated_images/tiny_top_5",
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperFolder:
    monkeypatch.chdir(tmp_path)
    return PaperFolder(tmp_path)


def builder(place: PaperFolder, protocol: str = "published") -> Builder:
    return Builder(place.runs(protocol), PUBLISHED, PLAN)


def cells(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_text(table))))


def as_published(setting: str, kind: str) -> dict[str, Measured]:
    with TABLES.open(newline="") as file:
        row = next(r for r in csv.DictReader(file) if (r["setting"], r["type"]) == (setting, kind))
    return {measure: Measured(float(row[measure]), 0.0) for measure in MEASURES}


def compared(table: str, ours: Callable[[str, str], dict[str, Measured]]) -> list[dict[str, str]]:
    rows = published_comparisons(PUBLISHED, table, lambda *key: (ours(*key), ""))
    return cells(comparison_table("t", "t", rows, MEASURES))


# The published values.


@pytest.mark.parametrize("table", ["1", "4"])
def test_the_published_values_pass_through_untouched(table: str) -> None:
    with TABLES.open(newline="") as file:
        printed = [row for row in csv.DictReader(file) if row["table"] == table]
    made = compared(table, lambda setting, kind: {})
    columns = [name for name in printed[0] if name != "table"]
    assert [[row[name] for name in columns] for row in made] == [
        [row[name] for name in columns] for row in printed
    ]
    assert all(row[f"ours_{m}"] == "not run" for row in made for m in MEASURES)
    assert all(row[f"difference_{m}"] == "" for row in made for m in MEASURES)


def test_a_value_moved_by_one_deviation_shows_in_exactly_its_cell() -> None:
    moved = ("no refinement", "TM", "neurons")

    def ours(setting: str, kind: str) -> dict[str, Measured]:
        values = as_published(setting, kind)
        if (setting, kind) == moved[:2]:
            values[moved[2]] = Measured(674.5 + 624.5)
        return values

    found = {
        (row["setting"], row["type"], measure): row[f"difference_{measure}"]
        for row in compared("4", ours)
        for measure in MEASURES
    }
    assert found.pop(moved) == "1.0"
    # "" where the deviation was printed as 0.00: scaling factor 0.75, SSCD_Gen.
    assert {key for key, text in found.items() if text == ""} == {
        ("scaling factor 0.75", "VM", "sscd_gen")
    }
    assert set(found.values()) == {"0.0", ""}


@pytest.mark.parametrize(
    ("ours", "printed", "deviation", "expected"),
    [
        (0.99, "0.83", "0.16", "1.0"),
        (0.67, "0.83", "0.16", "-1.0"),
        (0.829, "0.83", "0.16", "0.0"),
        (0.5, "1.0", "0.0", ""),
        (3.0, "0", "", ""),
        (3.0, "", "", ""),
    ],
)
def test_differences(ours: float, printed: str, deviation: str, expected: str) -> None:
    assert difference(Measured(ours), Number(printed, deviation)) == expected


def test_every_published_setting_has_a_run() -> None:
    with TABLES.open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["setting"] in SETTINGS[row["table"]]


# Ours.


def test_a_whole_chain_gives_medians(place: PaperFolder) -> None:
    place.neurons()
    place.whole()
    table = builder(place).main_or_ablations("1")
    rows = [row for row in cells(table) if row["setting"] == "memorization neurons (NeMo)"]
    for row, known, neurons in zip(rows, ([0.5, 0.25], [0.125, 0]), ("2.5", "3"), strict=True):
        assert row["ours_neurons"] == neurons  # sizes 3 and 2; 3 (row 3 is not memorized)
        middle = sum(known) / 2
        for measure in ("sscd_orig", "sscd_gen", "d_sscd", "a_clip"):
            assert float(row[f"ours_{measure}"]) == pytest.approx(middle, abs=6e-4)
            assert float(row[f"ours_{measure}_dev"]) == pytest.approx(known[0] - middle, abs=1e-3)
        assert row["prompts"] == "2 of 2"
    published = Number(rows[0]["sscd_orig"], rows[0]["sscd_orig_dev"])
    assert rows[0]["difference_sscd_orig"] == difference(Measured(0.375), published) == "4.8"
    assert not any("NeMo" in note for note in table.notes)
    assert any("network abc" in note for note in table.notes)


def alter_picture(place: PaperFolder) -> None:
    folder = place.folder / "generated_images/tiny_blocked"
    shutil.copy(folder / "img_0000_00.jpg", folder / "img_0001_01.jpg")


def search_anew(place: PaperFolder) -> None:
    path = place.folder / "results/memorization_statistics_tiny.csv"
    path.write_text(path.read_text().replace("0.45", "0.46"))
    place.record(
        path.with_suffix(".json"),
        {"protocol": "published", **dict.fromkeys(THRESHOLD_FLAGS, 0.31), **BLOCKED.search},
        inputs={"prompts": sha256(place.folder / "prompts.csv")},
        output_sha256=sha256(path),
    )


CONFIG = "generated_images/tiny_blocked/config.json"
SEARCH = "results/memorization_statistics_tiny.json"
METRIC = "results/metrics_tiny/sscd_gen_blocked.json"
DETECTION = "results/metrics_tiny/detection_attention_entropy.json"
SCORES_OF = "results/detectors/attention_entropy_prompts.json"
OTHER = {"version": "tiny", "id": "another", "revision": None, "sha256": "0"}


@pytest.mark.parametrize(
    ("words", "file", "keys", "to", "says"),
    [
        ("neurons of another model", SEARCH, ("model",), OTHER, "belongs to the model another"),
        (
            "neurons of another protocol",
            SEARCH,
            ("settings", "protocol"),
            "paper",
            "protocol paper",
        ),
        ("a search not finished", SEARCH, ("finished",), False, "not finished"),
        ("neurons changed by hand", SEARCH, ("output_sha256",), "0", "changed since"),
        ("pictures of another model", CONFIG, ("model",), OTHER, "belongs to the model another"),
        ("pictures of another protocol", CONFIG, ("settings", "protocol"), "paper", "protocol"),
        ("pictures of another factor", CONFIG, ("settings", "scaling_factor"), 0.5, "factor = 0.5"),
        ("pictures of another mode", CONFIG, ("settings", "mode"), "initial_neurons", "mode ="),
        ("pictures not finished", CONFIG, ("finished",), False, "not finished"),
        ("pictures of other neurons", CONFIG, ("inputs",), {"neurons": "0"}, "searched anew"),
        ("a metric not finished", METRIC, ("finished",), False, "not finished"),
        ("a metric of other rows", METRIC, ("settings", "rows"), [0], "other rows"),
        ("a metric of other prompts", METRIC, ("inputs", "prompts"), "0", "another prompt file"),
        ("a metric of other pictures", METRIC, ("inputs", "pictures"), "0", "other pictures"),
        ("a metric of another reference", METRIC, ("inputs", "reference"), "0", "tiny_unblocked"),
        ("a search with another tau", SEARCH, ("settings", "threshold_stds"), 2.0, "stds = 2.0"),
        ("a search without top-k", SEARCH, ("settings", "use_top_k"), False, "top_k = False"),
        ("a search with another theta", SEARCH, ("settings", "initial_theta"), 4.0, "theta = 4.0"),
        ("a search with 5 rows", SEARCH, ("settings", "samples_per_prompt"), 5, "prompt = 5"),
        ("a search of other prompts", SEARCH, ("inputs", "prompts"), "0", "another prompt file"),
        (
            "a search with a threshold by hand",
            SEARCH,
            ("settings", "ssim_threshold_refinement"),
            0.9,
            "several thresholds",
        ),
        ("pictures in half precision", CONFIG, ("settings", "dtype"), "float16", "dtype = float16"),
        ("pictures of another seed", CONFIG, ("settings", "seed"), 3, "seed = 3, not 2"),
        ("pictures of fewer steps", CONFIG, ("settings", "steps"), 20, "steps = 20, not 50"),
        ("scores of fewer pictures", METRIC, ("settings", "num_samples"), 1, "= 1, not 2"),
        ("of fewer originals", METRIC, ("settings", "num_ref_samples"), 1, "num_ref_samples = 1"),
        ("scores changed by hand", METRIC, ("output_sha256",), "0", "changed since"),
        ("a search without a checksum", SEARCH, ("output_sha256",), None, "changed since"),
        ("a search without settings", SEARCH, ("settings",), [1], "has no settings"),
        ("pictures without inputs", CONFIG, ("inputs",), None, "has no inputs"),
    ],
)
def test_what_does_not_belong_is_not_taken(
    words: str, file: str, keys: tuple[str, ...], to: object, says: str, place: PaperFolder
) -> None:
    place.neurons()
    place.whole()
    change(place.folder / file, *keys, to=to)
    table = builder(place).main_or_ablations("1")
    row = next(row for row in cells(table) if row["setting"] == "memorization neurons (NeMo)")
    assert row["ours_sscd_gen"] == "not run", words
    notes = [note for note in table.notes if "memorization neurons (NeMo)" in note]
    assert any(says in note for note in notes), notes
    assert row["ours_sscd_orig"] == ("0.375" if file == METRIC else "not run")


@pytest.mark.parametrize("alter", [alter_picture, search_anew])
def test_what_was_made_anew_breaks_the_chain(
    alter: Callable[[PaperFolder], None], place: PaperFolder
) -> None:
    place.neurons()
    place.whole()
    alter(place)
    row = next(
        row
        for row in cells(builder(place).main_or_ablations("1"))
        if row["setting"] == "memorization neurons (NeMo)"
    )
    assert [row[f"ours_{measure}"] for measure in METRICS_OF_PICTURES] == ["not run"] * 4


METRICS_OF_PICTURES = ("sscd_orig", "sscd_gen", "d_sscd", "a_clip")


def test_a_method_has_its_published_options_or_those_of_its_row(place: PaperFolder) -> None:
    wanda = SETTINGS["1"]["Wanda pruning (Chavhan et al.)"][0]
    folder = place.pictures(wanda)
    change(folder / "config.json", "settings", "mitigation_options", "share", to=0.5)
    notes = builder(place).main_or_ablations("1").notes
    assert any("'share': 0.5" in note and "not {'share': 0.01" in note for note in notes)


def test_disentanglement_is_of_the_neurons_of_now(place: PaperFolder) -> None:
    place.neurons()
    path = place.disentanglement("located")
    assert cells(builder(place).disentanglement())[0]["1 located"] == "0.5000"
    change(path.with_suffix(".json"), "inputs", "neurons", to="0")
    assert "searched anew" in "\n".join(builder(place).disentanglement().notes)


@pytest.mark.parametrize(
    ("words", "keys", "to", "says"),
    [
        ("neurons", ("settings", "neurons"), "located", "neurons = located, not random"),
        ("layers at once", ("settings", "together"), True, "together = True, not False"),
        ("samples", ("settings", "num_samples"), 2, "num_samples = 2, not 10"),
        ("steps", ("settings", "num_inference_steps"), 10, "steps = 10, not 50"),
        ("prompts", ("inputs", "prompts"), "0", "another prompt file"),
    ],
)
def test_disentanglement_by_other_settings_is_not_taken(
    words: str, keys: tuple[str, ...], to: object, says: str, place: PaperFolder
) -> None:
    path = place.disentanglement()
    assert cells(builder(place).disentanglement())[0]["1 random"] == "0.5000"
    change(path.with_suffix(".json"), *keys, to=to)
    table = builder(place).disentanglement()
    notes = [note for note in table.notes if "random neurons" in note]
    assert not table.rows and any(says in note for note in notes), (words, table.notes)


def test_a_prompt_file_that_is_gone_is_named(place: PaperFolder) -> None:
    place.pictures(HOLDOUT_UNBLOCKED)
    place.metric("diversity", HOLDOUT_UNBLOCKED, holdout=True)
    (place.folder / "holdout.csv").unlink()
    notes = "\n".join(builder(place).most_frequent().notes)
    assert "its prompt file holdout.csv is not there" in notes


def test_pictures_of_other_prompts_are_named(place: PaperFolder) -> None:
    """Without neurons nothing else ties them to their captions."""
    place.neurons()
    place.whole(UNBLOCKED)
    prompts = place.folder / "prompts.csv"
    prompts.write_text(prompts.read_text().replace("two", "2"))
    for metric in METRICS:  # measured anew, unlike the pictures
        place.metric(metric, UNBLOCKED)
    notes = "\n".join(builder(place).main_or_ablations("1").notes)
    assert f"{place.runs().folder('unblocked')}: made with another prompt file" in notes, notes


def test_published_weights_of_another_name_are_another_network(place: PaperFolder) -> None:
    place.neurons()
    place.whole(UNBLOCKED)
    place.whole()
    for setting, tag in ((UNBLOCKED, "openai"), (BLOCKED, "laion2b_s34b_b79k")):
        record = place.runs().metric_path("alignment", setting.run).with_suffix(".json")
        network = {"clip ViT-B-32": {"name": "ViT-B-32", "pretrained": tag}}
        change(place.folder / record, "model", to=network)
    table = builder(place).main_or_ablations("1")
    row = next(row for row in cells(table) if row["setting"] == "memorization neurons (NeMo)")
    assert row["ours_a_clip"] == "not run" and row["ours_sscd_gen"] != "not run"


def test_a_prompt_that_is_undecided_has_no_set_that_differs() -> None:
    def of(refined: list[list[int]] | None) -> Result:
        return Result(0, "a", "", refined, 0.1, refined, 0.1)

    both = {"published": {0: of([[1]]), 1: of(None)}, "paper": {0: of([[2]]), 1: of([[3]])}}
    assert paper_tables._differing_prompts(both) == [["neurons of row 0", "1 (0)", "1"]]


def test_another_network_is_not_mixed_in(place: PaperFolder) -> None:
    place.neurons()
    place.whole(UNBLOCKED)
    place.whole()
    change(place.folder / METRIC, "model", to={"another network": {"sha256": "def"}})
    table = builder(place).main_or_ablations("1")
    row = next(row for row in cells(table) if row["setting"] == "memorization neurons (NeMo)")
    assert row["ours_sscd_gen"] == "not run"
    assert any("another network def, others with network abc" in note for note in table.notes)


def test_repetitions_are_averaged_and_counted(place: PaperFolder) -> None:
    place.neurons()
    first, second = SETTINGS["1"]["random neurons"][:2]
    place.whole(first)
    place.pictures(second)
    for metric in METRICS:
        place.metric(metric, second, {row: score + 0.2 for row, score in SCORES.items()})
    rows = [
        r for r in cells(builder(place).main_or_ablations("1")) if "random neurons" in r["setting"]
    ]
    assert float(rows[0]["ours_sscd_orig"]) == pytest.approx(0.375 + 0.1, abs=5e-4)
    assert rows[0]["prompts"] == "2 of 2, 2 draws"


def test_repetitions_that_are_missing_are_named(
    place: PaperFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were planned, beside what else is missing; a measure that one draw lacks is none
    of the mean."""
    place.neurons()
    first, second, third = SETTINGS["1"]["random neurons"][:3]
    place.whole(first)
    place.whole(second)
    place.metric("alignment", second, dict.fromkeys(SCORES))
    monkeypatch.setattr(
        sys.modules[__name__],
        "PLAN",
        [*PLAN, f"python 4_generate_images.py -o=generated_images/tiny_{third.run}"],
    )
    table = builder(place).main_or_ablations("1")
    rows = [row for row in cells(table) if row["setting"] == "random neurons"]
    assert [row["ours_a_clip"] for row in rows] == ["none"] * 2
    assert all(row["ours_sscd_orig"] != "none" and "2 draws" in row["prompts"] for row in rows)
    notes = [note for note in table.notes if re.search(r"tiny_random_\d", note)]
    assert len(notes) == 1 and "random_2 (generated_images/tiny_random_2" in notes[0]


def test_what_several_settings_lack_names_all_of_them(place: PaperFolder) -> None:
    notes = builder(place).main_or_ablations("1").notes
    (note,) = (n for n in notes if "memorization_statistics_tiny.csv" in n and "not there" in n)
    assert "random neurons" in note and "memorization neurons (NeMo)" in note


def test_layers_are_those_of_the_search(place: PaperFolder) -> None:
    """Names and widths stand in the record of script 3; downloaded statistics have no record."""
    path = place.neurons()
    change(path.with_suffix(".json"), "layers", to={"down.attn2.to_v": 8, "b": 16, "c": 32})
    table = builder(place).neurons_per_layer()
    assert [row[1:3] for row in table.rows] == [["down", "8"], ["b", "16"], ["c", "32"]]
    assert not any("not run" in note for note in table.notes)


def test_stages_that_were_not_run_are_named(
    place: PaperFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = "python metrics/compute_detector_scores.py -o=results/detectors/a.csv"
    monkeypatch.setattr(sys.modules[__name__], "PLAN", [*PLAN, detector])
    place.neurons()
    table = builder(place).cost()
    rows = {row[0]: row for row in table.rows}
    assert rows["generated_images/tiny_blocked"][2] == "not run"
    assert rows["results/detectors/a.csv"][2] == "not run"
    assert rows["results/memorization_statistics_tiny.csv"][2] == "2.00"  # 8 s, 4 prompts
    assert not any("metrics" in stage for stage in rows)
    notes = [note for note in table.notes if note.startswith("not run")]
    assert len(notes) == 3 and notes[-1].endswith(f"Command: {detector}")


def test_detection_has_two_readings_of_its_level(place: PaperFolder) -> None:
    rates = {"auroc": 0.9, "accuracy": 0.8, "tpr_at_1_fpr_below": 0.5, "tpr_at_1_fpr_nearest": 0.75}
    found = {"all": {**rates, "memorized": 3, "unmemorized": 4}}
    place.detection("attention_entropy_e", detection=found)
    row = next(row for row in cells(builder(place).detection()) if "entropy E" in row["detector"])
    assert row["TPR at 1%, ours"] == "0.5000" and row["TPR near 1%, ours"] == "0.7500"


@pytest.mark.parametrize(
    ("words", "file", "keys", "to", "says"),
    [
        ("column", DETECTION, ("settings", "score_column"), "Score E", "score_column = Score E"),
        ("detector", SCORES_OF, ("settings", "detector"), "pairwise_ssim", "of pairwise_ssim"),
        ("prompts", SCORES_OF, ("inputs", "prompts.csv"), "0", "another prompt file"),
        ("samples", SCORES_OF, ("settings", "samples_per_prompt"), 4, "prompt = 4, not 1"),
        ("steps", SCORES_OF, ("settings", "num_inference_steps"), 10, "steps = 10, not 50"),
        ("guidance", SCORES_OF, ("settings", "guidance_scale"), 3.0, "scale = 3.0, not 7.5"),
        ("one file alone", DETECTION, ("inputs",), {}, "without scores of prompts.csv"),
    ],
)
def test_detection_by_other_scores_is_not_taken(
    words: str, file: str, keys: tuple[str, ...], to: object, says: str, place: PaperFolder
) -> None:
    path = place.detection("attention_entropy", detection={})
    assert place.runs().detection_record(path.relative_to(place.folder), "attention_entropy")
    change(place.folder / file, *keys, to=to)
    notes = [note for note in builder(place).detection().notes if "entropy (Ren" in note]
    assert any(says in note for note in notes), (words, notes)


def test_prompts_without_a_type_have_rows_of_their_own(place: PaperFolder) -> None:
    """Published values are of VM and TM; a file of ours need not say which is which."""
    (place.folder / "prompts.csv").write_text(PROMPTS.replace(";VM", ";").replace(";TM", ";"))
    place.neurons()
    place.whole(UNBLOCKED)
    place.whole()
    table = builder(place).main_or_ablations("1")
    name = "memorization neurons (NeMo)"
    rows = {row["type"]: row for row in cells(table) if row["setting"] == name}
    assert [row["ours_sscd_orig"] for row in rows.values()] == ["none", "none", "0.188"]
    assert rows["all"]["ours_neurons"] == "3" and rows["all"]["prompts"] == "4 of 4"
    assert rows["VM"]["prompts"] == "no VM prompts" and rows["VM"]["sscd_orig"] == "0.09"
    assert not any(name in note for note in table.notes)
    layers = builder(place).neurons_per_layer()
    assert layers.columns[-1] == "per prompt" and layers.rows[0][-1] == "1.33"


def test_each_measure_says_how_many_prompts_it_has(place: PaperFolder) -> None:
    place.neurons()
    place.whole()
    place.metric("sscd_orig", BLOCKED, {**SCORES, 0: None})
    rows = [row for row in cells(builder(place).main_or_ablations("1")) if "NeMo" in row["setting"]]
    assert [row["prompts"] for row in rows] == ["2 of 2 (SSCD_Orig 1)", "2 of 2"]
    assert rows[0]["ours_sscd_orig"] == "0.250" and rows[0]["ours_sscd_gen"] == "0.375"


def test_an_ablation_is_compared_on_its_own_prompts(place: PaperFolder) -> None:
    """What it is compared with is a run over more of them."""
    place.neurons()
    place.whole(UNBLOCKED)
    place.whole()
    some = {0: 0.75, 2: 0.5}
    for setting in (most_frequent(5), SETTINGS["4"]["scaling factor -1"][0]):
        folder = place.pictures(setting)
        change(folder / "config.json", "settings", "rows", to=[0, 2])
        for metric in METRICS:
            place.metric(metric, setting, some, rows=[0, 2])
    rows = {row[0]: row for row in builder(place).most_frequent().rows if row[1] == "memorized"}
    assert rows["0"][2] == "0.312 ± 0.188" and rows["5"][2] == "0.625 ± 0.125"
    assert rows["0"][-1] == rows["5"][-1] == "2 of 4"
    table = [
        row for row in cells(builder(place).main_or_ablations("4")) if DEFAULT in row["setting"]
    ]
    assert [row["ours_d_sscd"] for row in table] == ["0.500", "0.125"]
    assert [row["ours_neurons"] for row in table] == ["3", "3"]
    assert [row["prompts"] for row in table] == ["1 of 2"] * 2


def test_scores_under_another_name_are_named(place: PaperFolder) -> None:
    """As with --sscd_protocol=all."""
    place.neurons()
    place.pictures()
    place.metric("sscd_orig", BLOCKED, name="nemo Max")
    notes = "\n".join(builder(place).main_or_ablations("1").notes)
    assert "sscd_orig_blocked.csv: has no score 'Max'" in notes


def test_what_was_not_run_names_its_command(place: PaperFolder) -> None:
    notes = "\n".join(builder(place).main_or_ablations("1").notes)
    assert "python 3_detect_memorized_neurons.py --version=tiny" in notes
    place.neurons()
    notes = "\n".join(builder(place).main_or_ablations("1").notes)
    assert "-o=generated_images/tiny_blocked" in notes
    place.pictures()
    notes = "\n".join(builder(place).main_or_ablations("1").notes)
    assert "compute_sscd_gen.py -o=results/metrics_tiny/sscd_gen_blocked.csv" in notes
    assert "sh runs/tiny.sh" in notes  # the plan of this test has no command for the others


def test_every_table_is_made_of_nothing_and_of_a_whole_run(place: PaperFolder) -> None:
    empty = builder(place).tables()
    assert len({table.name for table in empty}) == len(empty) == 11
    place.neurons()
    levels = dict.fromkeys(THRESHOLD_FLAGS, 0.2)
    place.neurons("paper_protocol", protocol="paper", **levels)
    for setting in (UNBLOCKED, BLOCKED, most_frequent(5), SETTINGS["4"]["scaling factor -1"][0]):
        place.whole(setting)
    place.whole(PAPER_PROTOCOL, protocol="paper")
    tables = {table.name: table for table in builder(place).tables()}
    assert tables["neurons_per_prompt"].rows[0][:6] == ["0", "VM", "3", "0.400", "3", "0.450"]
    assert tables["shared_neurons"].rows[0] == ["0", "1", "2", "2", "0"]
    per_layer = tables["neurons_per_layer"].rows
    assert [row[3] for row in per_layer] == ["3", "1", "3"]
    assert [row[4] for row in per_layer] == ["1.50", "0.50", "0.50"]
    cost = tables["table_2_cost"].rows
    assert cost[0][1:4] == ["15.7", "1.50", "2"] and cost[1][1:4] == ["45.9", "4.00", "1"]
    protocols = tables["protocols"]
    assert protocols.rows[0] == ["threshold", "0.3100", "0.2000"]
    frequent = tables["most_frequent_neurons"].rows
    assert [row[:2] for row in frequent if "not run" not in row] == [
        ["0", "memorized"],
        ["5", "memorized"],
    ]


def test_the_paper_protocol_has_tables_of_its_own(place: PaperFolder) -> None:
    place.neurons(protocol="paper")
    place.whole(protocol="paper")
    for protocol, expected in {"paper": "0.375", "published": "not run"}.items():
        rows = cells(builder(place, protocol).main_or_ablations("1"))
        row = next(row for row in rows if row["setting"] == "memorization neurons (NeMo)")
        assert row["ours_sscd_orig"] == expected


# Forms.

AWKWARD = r'50% of $5 & #1 {a} ~b ^c <d> \e "f" `g` --rows=0-9 x_y | z ± Ж'


def test_latex_is_well_formed(tmp_path: Path) -> None:
    row = Comparison(AWKWARD, "VM", {"a": Number("0.1", "0.2")}, {"a": Measured(0.3, 0.1)})
    table = comparison_table("table", f"Title {AWKWARD}", [row], {"a": (AWKWARD, 2)}, [AWKWARD])
    text = latex(table)
    bare = re.sub(r"\\textbackslash\{\}|\\[&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0 and "#" not in bare and "%" not in bare and "Ж" not in bare
    body = text.split(r"\endfoot")[1].split(r"\end{longtable}")[0]
    for line in filter(str.strip, body.splitlines()):
        assert line.endswith((r" \\", r" \\*"))
        assert len(re.findall(r"(?<!\\)&", line)) == len(table.columns) - 1
    assert re.findall(r"\\(begin|end)\{(\w+)\}", text) == [
        ("begin", "longtable"),
        ("end", "longtable"),
        ("begin", "itemize"),
        ("end", "itemize"),
    ]
    write_tables([table], tmp_path)
    assert r"\input{table}" in (tmp_path / "tables.tex").read_text()


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex on this machine")
@pytest.mark.parametrize("whole", [False, True])
def test_latex_compiles(whole: bool, place: PaperFolder) -> None:
    """All tables of a run, and of none."""
    if whole:
        place.neurons()
        place.whole(UNBLOCKED)
        place.whole()
    awkward = comparison_table("t", f"Title {AWKWARD}", [Comparison(AWKWARD, "VM")], MEASURES)
    write_tables([*builder(place).tables(), awkward], place.folder / "tables")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"],
        cwd=place.folder / "tables",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_lines_of_one_setting_stay_on_a_page() -> None:
    rows = [["a", "published"], ["", "ours"], ["", "difference"], ["b", "ours"]]
    body = latex(Table("t", "t", ("setting", "number"), rows)).split(r"\endfoot")[1]
    assert [line.endswith("*") for line in body.splitlines()[1:5]] == [True, True, False, False]


def test_escaping_keeps_plain_text() -> None:
    assert escape("plain text 1.5") == "plain text 1.5"
    assert escape("100% & _") == r"100\% \& \_\allowbreak{}"


def test_markdown_cells_stay_cells() -> None:
    text = markdown(Table("t", "T", ("a|b", "c"), [["1|2", "3"]], ["note"]))
    assert text == "## T\n\n| a\\|b | c |\n| --- | --- |\n| 1\\|2 | 3 |\n\n- note\n"


# The script.


def run(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "metrics/make_tables.py"), *options],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_writes_all_forms(place: PaperFolder) -> None:
    place.neurons()
    place.whole()
    files = ("-p=prompts.csv", "--holdout=holdout.csv")
    done = run("--version=tiny", *files, cwd=place.folder)
    assert done.returncode == 0, done.stderr
    folder = place.folder / "results/tables_tiny"
    for name, title in TITLES.values():
        assert title in (folder / f"{name}.md").read_text()
        for ending in ("md", "csv", "tex"):
            assert (folder / f"{name}.{ending}").stat().st_size
    notes = (folder / "tables.md").read_text()
    # The commands are those of runs/tiny.sh, whole.
    assert (
        "python 4_generate_images.py --version=tiny -d=prompts/tiny_memorized_prompts.csv "
        "--mitigation=wanda -n=4 -b=24 -o=generated_images/tiny_wanda"
    ) in notes


def test_a_file_is_no_folder_of_tables(place: PaperFolder) -> None:
    done = run(
        "--version=tiny",
        "-p=prompts.csv",
        "--holdout=holdout.csv",
        "-o=prompts.csv",
        cwd=place.folder,
    )
    assert done.returncode == 2 and "-o prompts.csv: is a file; name a folder" in done.stderr


def test_lines_of_one_setting_are_named_once() -> None:
    row = Comparison("a", "VM", {"m": Number("1", "1")}, {"m": Measured(2, 0)}, "3 of 4")
    table = comparison_table("t", "t", [row, Comparison("b", "VM")], {"m": ("M", 1)})
    assert [line[:4] for line in table.rows] == [
        ["a", "VM", "", "published"],
        ["", "", "3 of 4", "ours"],
        ["", "", "", "difference"],
        ["b", "VM", "", "ours"],
    ]
    assert all(table.columns)


@pytest.mark.parametrize(
    ("words", "options", "says"),
    [
        ("no such model", ["--version=nonsense"], "--version nonsense"),
        ("no prompt file", ["--version=tiny", "-p=none.csv"], "none.csv: no such file"),
        ("unknown protocol", ["--version=tiny", "--protocol=mine"], "--protocol"),
        ("unknown option", ["--version=tiny", "--best"], "--best"),
    ],
)
def test_bad_input(words: str, options: list[str], says: str, tmp_path: Path) -> None:
    done = run(*options, cwd=tmp_path)
    assert done.returncode == 2, words
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())
