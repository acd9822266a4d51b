"""The report of a run: what it says, what it never does, and how it behaves in a browser."""

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from browser import chromium, watched
from report_runs import HOSTILE, make_run
from workspace import ROOT, run

from utils.attack_runs import COLUMNS
from utils.errors import InputError
from utils.files import read_table, write_json
from utils.html_report import Options, make_report
from utils.run_folder import find_parts

MANY = 500


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight prompts; to be read only."""
    return make_run(tmp_path_factory.mktemp("report") / "run", 8, samples=2, side=32)


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "run"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of 500 prompts, two samples each."""
    folder = make_run(tmp_path_factory.mktemp("many") / "run", MANY, samples=2, side=128)
    page = folder / "report.html"
    page.write_text(make_report(find_parts(folder), Options()), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def report(folder: Path, **options: int) -> str:
    return make_report(find_parts(folder), Options(**options))


def test_five_hundred_prompts_make_a_page_that_mail_takes(many: Path) -> None:
    size = many.stat().st_size
    print(f"{MANY} prompts, 5 pictures each: {size / 1e6:.1f} MB")
    assert size < 15e6
    assert many.read_text(encoding="utf-8").count("<article") == MANY


def test_the_page_asks_for_nothing(small: Path) -> None:
    page = report(small)
    for address in re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>\s]+)""", page):
        assert address.startswith(("data:image/", "#")), address
    assert not re.findall(r"url\(|@import|fetch\(|XMLHttp|<link|<iframe", page)
    assert "default-src 'none'" in html.unescape(page)


def test_the_same_run_gives_the_same_bytes(own: Path) -> None:
    first = run(ROOT / "report.py", str(own), cwd=own)
    page = (own / "report.html").read_bytes()
    second = run(ROOT / "report.py", str(own), cwd=own)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (own / "report.html").read_bytes() == page


def test_numbers_of_the_summary(small: Path) -> None:
    rows = read_table(small / "results" / "memorization_statistics_small.csv")[1]
    refined = [eval(cells["Refined Neurons"]) for cells in rows]  # our own file
    sizes = [sum(map(len, neurons)) for neurons in refined if any(neurons)]
    after = [float(c["Refined SSIM"]) for c, n in zip(rows, refined, strict=True) if any(n)]
    page = report(small)
    assert f"{len(sizes)} of 8 prompts are memorized" in page
    assert f"a median of {median(sizes):g} neurons a prompt" in page
    assert f"to {median(after):.3f}." in page
    assert "3 of 8 prompts give a copy" in page
    assert "threshold of 0.400" in page


def test_a_caption_is_text(small: Path) -> None:
    page = report(small)
    assert "<script>document.title" not in page
    assert "&lt;script&gt;document.title" in page
    assert "&lt;b&gt;KID&lt;/b&gt;" in page  # a metric's own lines


def test_tables_are_read_from_either_form(own: Path) -> None:
    rows = "| Method | SSCD |\n| --- | --- |\n| a\\|b <i> | 0.5 |"
    text = f"## Table 1: main\n\n{rows}\n\n- one not run\n"
    (own / "tables" / "table_1.md").write_text(text, encoding="utf-8")
    (own / "tables" / "table_1.csv").write_text("other,form\n1,2\n", encoding="utf-8")
    (own / "tables" / "tables.md").write_text(text, encoding="utf-8")
    page = report(own)
    assert page.count("Table 1: main") == 1 and '<td class="left">a|b &lt;i&gt;</td>' in page
    assert "<td>0.5</td>" in page and "one not run" in page and '<th scope="col">form' not in page
    assert "Main results" in page  # from its .csv


def test_what_is_missing_is_named_and_not_invented(own: Path) -> None:
    shutil.rmtree(own / "generated_images" / "small_blocked")
    shutil.rmtree(own / "results" / "metrics_small")
    (own / "results" / "memorization_scores_small.csv").unlink()
    (own / "original_images" / "0003_first_image.jpg").unlink()
    (own / "generated_images" / "small_unblocked" / "img_0002_00.jpg").write_bytes(b"no picture")
    page = report(own)
    assert "Pictures &#39;blocked&#39;: not there; made by 4_generate_images.py" in page
    for part in ("Metrics", "Memorization scores", "Attack curves"):
        assert f"{part}: not there" in page
    assert "0003_first_image.jpg)" in page
    assert "cannot be read: 1" in page and "img_0002_00.jpg" in page
    assert "give a copy" not in page and "SSCD" not in page and "NaN" not in page
    assert re.search(r"\(median\) to \d", page)  # without scores there is no "from"


def test_pictures_of_another_result_file_are_left_out(own: Path) -> None:
    path = own / "results" / "memorization_statistics_small.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("0.3001", "0.3002"), encoding="utf-8")
    found = find_parts(own)
    assert set(found.images) == {"unblocked"}
    assert any("small_blocked" in note for note in found.missing)
    # Nor are their scores shown.
    metrics = own / "results" / "metrics_small"
    for ending in ("csv", "json"):
        shutil.copy(metrics / f"sscd_orig_unblocked.{ending}", metrics / f"of_blocked.{ending}")
    record = json.loads((metrics / "of_blocked.json").read_text())
    names = ("generated_images/small_unblocked", "generated_images/small_blocked")
    inputs = dict.fromkeys(names, "")  # compared with what is shown
    shown = report(own)
    write_json(metrics / "of_blocked.json", record | {"inputs": inputs})
    assert report(own).count("SSCD_Orig") < shown.count("SSCD_Orig")


def test_training_images_are_those_of_the_models_folder_where_it_has_some(own: Path) -> None:
    """The usual name may hold those of another model that was run in the same place."""
    assert find_parts(own)["training_images"] == own / "original_images"
    shutil.copytree(own / "original_images", own / "small" / "training_images")
    assert find_parts(own)["training_images"] == own / "small" / "training_images"
    write_json(own / "run.json", {"training_images": "original_images"})
    assert find_parts(own)["training_images"] == own / "original_images"


def test_more_pictures_are_shown_when_asked_for(own: Path) -> None:
    images = own / "generated_images"
    shutil.copytree(images / "small_blocked", images / "small_half_off")
    found = find_parts(own, tag="small")
    assert list(found.images) == ["unblocked", "blocked"] and list(found.hidden) == ["half_off"]
    assert any("half_off" in note for note in found.missing)
    found = find_parts(own, tag="small", labels=["half_off"])
    assert list(found.images) == ["unblocked", "blocked", "half_off"]
    assert "half_off, sample 1" in make_report(found, Options())
    with pytest.raises(InputError, match="no pictures 'other'"):
        find_parts(own, tag="small", labels=["other"])


def test_run_file_names_the_parts(own: Path) -> None:
    (own / "elsewhere").mkdir()
    shutil.move(own / "generated_images" / "small_blocked", own / "elsewhere" / "off")
    images = {
        "guidance": "elsewhere/off",
        "unblocked": "generated_images/small_unblocked",
        "gone": "nowhere",
    }
    write_json(own / "run.json", {"title": "Run <1>", "attack": "no attacks", "images": images})
    found = find_parts(own)
    assert list(found.images) == ["unblocked", "guidance"]
    assert sum("nowhere" in note or "no attacks" in note for note in found.missing) == 2
    assert "<title>Run &lt;1&gt;</title>" in make_report(found, Options())


def test_two_models_in_one_folder_need_a_choice(own: Path) -> None:
    results = own / "results"
    shutil.copy(
        results / "memorization_statistics_small.csv", results / "memorization_statistics_big.csv"
    )
    with pytest.raises(InputError, match="--version"):
        find_parts(own)
    assert find_parts(own, tag="small")["results"] == results / "memorization_statistics_small.csv"


def test_a_changed_caption_is_refused_or_left_out(own: Path) -> None:
    prompts = own / "prompts" / "memorized.csv"
    text = prompts.read_text(encoding="utf-8")
    prompts.write_text(text.replace("number 3", "number three"), encoding="utf-8")
    found = find_parts(own)
    assert found["prompts"] is None and any("so have captions" in n for n in found.missing)
    write_json(own / "run.json", {"prompts": "prompts/memorized.csv"})
    with pytest.raises(InputError, match="row 3"):
        report(own)


def test_captions_are_those_of_the_column_that_the_run_read(own: Path) -> None:
    prompts = own / "prompts" / "memorized.csv"
    text = prompts.read_text(encoding="utf-8")
    prompts.write_text(text.replace("Caption;", "text;", 1), encoding="utf-8")
    place = own / "results" / "memorization_statistics_small.json"
    record = json.loads(place.read_text())
    write_json(place, record | {"settings": record["settings"] | {"caption_column": "text"}})
    found = find_parts(own)
    assert found["prompts"] == prompts and any("are the same" in note for note in found.missing)
    assert "Prompt number 2" in report(own)


SCAN = "results/memorization_scores_small.csv"
VALUES = "results/metrics_small/sscd_orig_unblocked.csv"
ATTACK = "results/metrics_small/attack_zero.csv"
HEADER = ";".join(COLUMNS)
METRIC = "results/metrics_small/sscd_orig_unblocked.json"
MEDIAN = json.dumps(
    {"finished": True, "metric": "m", "scores": {"Max": {"all": {"median": "high", "mad": 0}}}}
)


@pytest.mark.parametrize(
    ("name", "old", "new", "counted", "shown"),
    [
        # Prompts of another file have the same row numbers; prompt 1 has a caption of its own.
        (SCAN, "Prompt number", "Other prompt", "7 of 8", r"\(median\) from \d"),
        (ATTACK, "Prompt number", "Other prompt", "3 of 3", "75% after 50"),
        # A superscript is a digit to Python, and no number.
        (VALUES, "\n3;Prompt", "\n²;Prompt", "1 of 8", r"<td>0\.625</td>"),
    ],
)
def test_rows_of_other_prompts_are_counted_and_not_shown(
    own: Path, name: str, old: str, new: str, counted: str, shown: str
) -> None:
    assert re.search(shown, report(own))
    text = (own / name).read_text(encoding="utf-8")
    (own / name).write_text(text.replace(old, new), encoding="utf-8")
    page = report(own)
    assert not re.search(shown, page)
    assert f"/{name} that are left out" in page and f"caption: {counted}.</li>" in page


@pytest.mark.parametrize(
    ("spoil", "options", "said"),
    [
        ("", ["nowhere"], "nowhere: no such folder"),
        ("", ["original_images"], "nothing of a run in it"),
        ("run.json:{", ["."], "not valid JSON"),
        ('run.json:{"colour": "red"}', ["."], "'colour' is not known"),
        ('run.json:{"images": {"a": 1}}', ["."], "something other than text"),
        ("report.html:my notes", ["."], "is no report of ours"),
        ("", [".", "-o=figures"], "figures: a folder"),
        ("", [".", "--samples=0"], "0 is not within 1"),
        ("", [".", "--version=nothing"], "not a short name"),
        (f"{ATTACK}:Row;Steps\n1;2\n", ["."], "not a table of metrics/attack.py"),
        (f"{ATTACK}:{HEADER}\n2;;VM;prompt;-1;1;1;1\n", ["."], "-1 is not within 0"),
        (f"{ATTACK}:{HEADER}\n2;;VM;prompt;0;1;1;nan\n", ["."], "not a finite number"),
        (f"{METRIC}:{MEDIAN}", ["."], "'median' is no number"),
        (f'{METRIC}:{{"finished": true, "model": [1]}}', ["."], "'model' is no object"),
        ("figures/score_distribution.png:x", ["."], "not a picture"),
    ],
)
def test_bad_input_is_one_line(own: Path, spoil: str, options: list[str], said: str) -> None:
    if spoil:
        name, _, text = spoil.partition(":")
        (own / name).write_text(text, encoding="utf-8")
    before = sorted(own.rglob("*"))
    done = run(ROOT / "report.py", *options, cwd=own)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert sorted(own.rglob("*")) == before


def test_dry_run_writes_nothing(own: Path) -> None:
    before = sorted(own.rglob("*"))
    done = run(ROOT / "report.py", ".", "--dry_run", cwd=own)
    assert done.returncode == 0 and "memorization_statistics_small.csv" in done.stdout
    assert sorted(own.rglob("*")) == before


# In a browser.


def test_many_prompts_can_be_searched_sorted_and_opened(browser: Any, many: Path) -> None:
    page = browser.new_page()
    wrong = watched(page)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(many.as_uri())
    shown = "#cards .card:not([hidden])"
    assert page.locator(shown).count() == MANY

    page.fill("#search", "NUMBER 41")
    found = [row for row in range(MANY) if "41" in str(row)]
    assert page.inner_text("#count") == f"{len(found)} of {MANY} prompts"
    rows = page.eval_on_selector_all(shown, "cards => cards.map(card => card.dataset.row)")
    assert rows == [str(row) for row in found]
    page.select_option("#type", "TM")
    rows = page.eval_on_selector_all(shown, "cards => cards.map(card => card.dataset.row)")
    assert rows == [str(row) for row in found if row % 3 == 0]
    page.select_option("#type", "")

    page.fill("#search", "script")
    assert page.locator(f"{shown} .caption").inner_text() == HOSTILE
    assert page.title() == "Memorization in small"

    page.fill("#search", "")
    page.select_option("#sort", label="SSCD_Orig (nemo), unblocked: Max")
    page.select_option("#order", "up")
    rows = page.eval_on_selector_all(shown, "cards => cards.map(card => card.dataset.row)")
    assert rows == [str(row) for row in reversed(range(MANY))]
    page.select_option("#sort", label="score, located neurons off")  # of memorized prompts alone
    page.select_option("#order", "down")
    rows = page.eval_on_selector_all(shown, "cards => cards.map(card => Number(card.dataset.row))")
    memorized = [row for row in reversed(range(MANY)) if row % 4]
    assert rows == memorized + [row for row in range(MANY) if row % 4 == 0]

    summary = page.locator("#prompt-2 summary")
    summary.focus()
    page.keyboard.press("Enter")
    card = page.locator("#prompt-2")
    assert card.locator("details").get_attribute("open") is not None
    assert card.locator("table").first.inner_text().split()[-4:] == ["0,", "1", "2", "5"]
    assert "75% after 50" in (card.locator("svg").get_attribute("aria-label") or "")
    broken = "images => images.filter(i => !(i.complete && i.naturalWidth)).length"
    assert card.locator("img").evaluate_all(broken) == 0

    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 1
    assert wrong == [] and requests == [many.as_uri()] + [r for r in requests if r[:5] == "data:"]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_fits_and_can_be_read(
    browser: Any, small: Path, tmp_path: Path, scheme: str, width: int
) -> None:
    path = tmp_path / "report.html"
    path.write_text(report(small), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    wrong = watched(page)
    page.goto(path.as_uri())
    page.click("#open")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = page.evaluate(
        """() => ["body", ".quiet", ".card h3", ".facts", "summary", "button"].map((name) => {
          const element = document.querySelector(name);
          let behind = element;
          const style = (e) => getComputedStyle(e);
          const bare = "rgba(0, 0, 0, 0)";
          while (style(behind).backgroundColor === bare) behind = behind.parentElement;
          return [name, style(element).color, style(behind).backgroundColor];
        })"""
    )
    for name, ink, paper in colours:
        assert contrast(ink, paper) >= 4.5, (name, ink, paper)
    dark = luminance(colours[0][2]) < 0.5
    assert dark == (scheme == "dark") and wrong == []
    page.close()


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
