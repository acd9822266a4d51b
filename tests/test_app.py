"""The local page: what one visitor gets, that two do not mix, and a click in a browser."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import chromium, watched
from PIL import Image
from workspace import ROOT, Warm, environment, run, save_model

from utils.activation_statistics import Statistics
from utils.app_server import hosts_of, is_open, listening_socket, state_of
from utils.app_session import (
    GUIDANCE,
    Bench,
    CancelledError,
    Edit,
    Job,
    Session,
    Studio,
    Visitors,
    result_table,
)
from utils.errors import InputError
from utils.files import read_json, read_prompts, write_json
from utils.localization import Search
from utils.neuron_sets import read_results, size
from utils.noise_difference import NoiseSettings, noise_difference
from utils.scoring import Detector
from utils.ssim import pairwise_ssim
from utils.stable_diffusion import (
    Model,
    decode,
    encode_prompt,
    encode_unconditional,
    initial_noise,
    load_model,
    sample_latents,
)
from utils.value_layers import layer_widths
from utils.versions import resolve

pytest.importorskip("starlette", reason="requirements-app.txt is not installed")
pytest.importorskip("uvicorn", reason="requirements-app.txt is not installed")

ROWS, STEPS, CAPTION, OTHER = 3, 3, "ab~c", "zyx w"


def silent(stage: str, done: int, total: int | None) -> None:
    """Hears nothing."""


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """A random model whose captions count as memorized: the threshold is below every score."""
    folder = tmp_path_factory.mktemp("app") / "model"
    save_model(folder)
    model = load_model(resolve(str(folder)), device="cpu", dtype="float32")
    widths = layer_widths(model.value_layers)
    statistics = Statistics(
        [torch.zeros(width) for width in widths],
        [torch.where(torch.arange(width) < 2, 1e-3, 1e3) for width in widths],
    )
    detector = Detector(model, NoiseSettings(), rows=ROWS, seed=1)
    return Studio(model, detector, statistics, 0.01, ROWS, STEPS, Search(min_theta=4.75))


@pytest.fixture
def bench(studio: Studio) -> Iterator[Bench]:
    opened = Bench(lambda: studio)
    wait_for(lambda: opened.state == "ready")
    yield opened
    opened.close()


def wait_for(true: Callable[[], object], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def finished(session: Session) -> Job:
    assert session.job is not None
    wait_for(lambda: session.job and session.job.over)
    return session.job


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def hooks(model: Model) -> int:
    return sum(len(layer._forward_hooks) for layer in model.value_layers.values())


# What a visitor gets.


def test_score_is_that_of_the_definition(studio: Studio) -> None:
    model = studio.model
    noise = initial_noise(model, ROWS, 1)
    difference = noise_difference(
        model, encode_prompt(model, CAPTION), None, noise, NoiseSettings()
    )
    score = studio.score(CAPTION, silent)
    assert score.value == pytest.approx(pairwise_ssim(difference).max().item(), abs=1e-6)
    assert score.memorized and not replace(score, threshold=score.value).memorized
    assert score.note == ""
    assert "tokens" in studio.score("a" * 100, silent).note  # a byte is a token here


def test_pictures_equal_plain_sampling_and_scaled_weights(studio: Studio) -> None:
    model, factor = studio.model, -0.5
    neurons: list[list[int]] = [[] for _ in model.value_layers]
    neurons[0], neurons[-1] = [1, 4], [0]
    made = studio.pictures(CAPTION, neurons, factor=factor, samples=2, seed=5, report=silent)

    def plain() -> list[np.ndarray]:
        latents = sample_latents(
            model,
            encode_prompt(model, CAPTION).repeat(2),
            encode_unconditional(model),
            initial_noise(model, 2, 5),
            steps=STEPS,
            guidance_scale=GUIDANCE,
        )
        return [np.asarray(picture) for picture in decode(model, latents)]

    for mine, expected in zip(made.unblocked, plain(), strict=True):
        assert np.array_equal(pixels(mine), expected)
    layers = list(model.value_layers.values())
    before = {layer: layer.weight.clone() for layer in layers}
    try:
        for layer, columns in zip(layers, neurons, strict=True):
            layer.weight[columns] *= factor
        scaled = plain()
    finally:
        for layer, weight in before.items():
            layer.weight.copy_(weight)
    for mine, expected in zip(made.blocked, scaled, strict=True):
        assert np.abs(pixels(mine).astype(int) - expected.astype(int)).max() <= 1
    assert not np.array_equal(pixels(made.blocked[0]), pixels(made.unblocked[0]))
    again = studio.pictures(
        CAPTION, neurons, factor=factor, samples=2, seed=5, report=silent, known=made
    )
    assert again == made


def test_neurons_are_exported_as_the_scripts_read_them(
    studio: Studio, bench: Bench, tmp_path: Path
) -> None:
    session = Session(bench)
    with pytest.raises(InputError, match="located yet"):
        session.ask_edit(0.0)
    session.ask_neurons(CAPTION)
    assert finished(session).state == "done"
    located = session.known_neurons()
    path = tmp_path / "located.csv"
    path.write_text(result_table(located), encoding="utf-8")
    (read,) = read_results(path, widths=layer_widths(studio.model.value_layers))
    assert read.refined == located.refined and read.caption == CAPTION
    assert read.refined_score == pytest.approx(located.refined_score, abs=1e-6)

    editing = pytest.importorskip("utils.edited_weights")
    session.ask_edit(0.25)
    assert finished(session).state == "done", session.job and session.job.sentence
    assert session.edit and session.edit.factor == 0.25
    diff = tmp_path / "edit.safetensors"
    diff.write_bytes(session.edit.data)
    base = editing.StoredWeights(editing.unet_files(studio.model.source.folder))
    assert editing.check_diff(diff, base, where="base")["neurons"] == str(size(located.refined))
    changed = editing.read_diff(diff, base)
    for name, columns in zip(studio.model.value_layers, located.refined, strict=True):
        expected = base[f"{name}.weight"].clone()
        expected[columns] *= 0.25
        assert torch.equal(changed.get(f"{name}.weight", base[f"{name}.weight"]), expected)


def test_a_refused_request_leaves_the_last_edit(bench: Bench) -> None:
    """While another one is at work, and when there is no model any more."""
    session = Session(bench)
    session.ask_neurons(CAPTION)
    assert finished(session).state == "done"
    last = session.edit = Edit(0.0, b"the last one")
    session.job = Job(lambda studio, report: None)  # one that waits
    with pytest.raises(InputError, match="still at work"):
        session.ask_edit(0.5)
    session.job = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "state", "failed")
        with pytest.raises(InputError):
            session.ask_edit(0.5)
    assert session.edit is last and state_of(bench, session)["edit"] == {"factor": 0.0}
    session.ask_edit(0.5)
    assert finished(session).state == "done" and session.edit is not last
    assert state_of(bench, session)["edit"] == {"factor": 0.5}


def test_not_memorized_means_no_neurons(studio: Studio) -> None:
    strict = Bench(lambda: replace(studio, threshold=0.999999))
    wait_for(lambda: strict.state == "ready")
    session = Session(strict)
    session.ask_pictures(CAPTION, 0.0, 1, 2)
    assert finished(session).state == "done"
    assert session.located and not size(session.located.refined)
    assert session.pictures and len(session.pictures.unblocked) == 1
    assert session.pictures.blocked == () and session.pictures.lost == 0
    with pytest.raises(InputError, match="not memorized"):
        session.ask_edit(0.0)
    strict.close()


@pytest.mark.parametrize(
    ("caption", "factor", "samples", "seed", "said"),
    [
        ("  ", 0.0, 1, 1, "Type a prompt first"),
        (None, 0.0, 1, 1, "Type a prompt first"),
        ("x" * 2001, 0.0, 1, 1, "2001 characters"),
        ("\ud83d", 0.0, 1, 1, "lone surrogate"),
        ("x", 1.5, 1, 1, "factor must be a number from -1 to 1"),
        ("x", float("nan"), 1, 1, "factor must be"),
        ("x", None, 1, 1, "factor must be"),
        ("x", True, 1, 1, "factor must be"),
        ("x", 0.0, 0, 1, "number of pictures must be a whole number from 1 to 8"),
        ("x", 0.0, 2.5, 1, "number of pictures"),
        ("x", 0.0, 1, -1, "seed must be a whole number from 0"),
        ("x", 0.0, 1, "2", "seed must be"),
    ],
)
def test_bad_input_gets_a_sentence(
    bench: Bench, caption: object, factor: object, samples: object, seed: object, said: str
) -> None:
    session = Session(bench)
    with pytest.raises(InputError, match=said):
        session.ask_pictures(caption, factor, samples, seed)
    assert session.job is None


# One model, several visitors.


def test_two_visitors_at_once_do_not_mix(studio: Studio) -> None:
    def alone(caption: str, factor: float) -> Session:
        own = Bench(lambda: studio)
        wait_for(lambda: own.state == "ready")
        session = Session(own)
        session.ask_pictures(caption, factor, 2, 7)
        finished(session)
        own.close()
        return session

    wanted = [(CAPTION, 0.0), (OTHER, -1.0)]
    expected = [alone(*what) for what in wanted]
    together = Bench(lambda: studio)
    wait_for(lambda: together.state == "ready")
    sessions = [Session(together) for _ in wanted]
    threads = [
        threading.Thread(target=session.ask_pictures, args=(*what, 2, 7))
        for session, what in zip(sessions, wanted, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for session, one in zip(sessions, expected, strict=True):
        assert finished(session).state == "done"
        assert session.pictures == one.pictures and session.located == one.located
    assert sessions[0].pictures != sessions[1].pictures
    together.close()
    assert hooks(studio.model) == 0


def test_another_prompt_takes_the_findings_of_the_last_away(bench: Bench) -> None:
    session = Session(bench)
    session.ask_pictures(CAPTION, 0.0, 1, 2)
    finished(session)
    assert session.located and session.pictures
    session.ask_score(OTHER)
    finished(session)
    assert session.score and session.score.caption == OTHER
    assert session.located is None and session.pictures is None


def test_cancel_ends_the_search_between_evaluations_and_leaves_no_trace(studio: Studio) -> None:
    heard = []

    def stop_at_third(stage: str, done: int, total: int | None) -> None:
        heard.append(stage)
        if len(heard) == 3:
            raise CancelledError

    fresh = studio.locate(CAPTION, silent)
    with pytest.raises(CancelledError):
        studio.locate(CAPTION, stop_at_third)
    assert len(heard) == 3 and hooks(studio.model) == 0
    again = studio.locate(CAPTION, silent)
    assert (again.refined, again.refined_score) == (fresh.refined, fresh.refined_score)
    heard.clear()
    neurons = [[0], *([] for _ in studio.model.value_layers)][:-1]
    with pytest.raises(CancelledError):
        studio.pictures(CAPTION, neurons, factor=0.0, samples=1, seed=1, report=stop_at_third)
    assert hooks(studio.model) == 0


def test_jobs_wait_in_line_and_can_be_cancelled_there(bench: Bench) -> None:
    gate, began = threading.Event(), threading.Event()

    def hold(studio: Studio, report: object) -> None:
        began.set()
        gate.wait()

    first, second, third = (Job(hold), Job(hold), Job(hold))
    for job in (first, second, third):
        bench.submit(job)
    began.wait()
    assert [bench.ahead(job) for job in (first, second, third)] == [0, 1, 2]
    second.cancel()
    assert second.state == "cancelled"  # not only when its turn comes
    assert bench.ahead(third) == 1
    gate.set()
    wait_for(lambda: third.over)
    assert [job.state for job in (first, second, third)] == ["done", "cancelled", "done"]


def test_who_cancels_in_line_may_ask_again_at_once(bench: Bench) -> None:
    session, gate = Session(bench), threading.Event()
    bench.submit(Job(lambda studio, report: gate.wait() and None))
    session.ask_score(CAPTION)
    session.cancel()
    session.ask_score(OTHER)
    assert session.job and session.job.state == "waiting" and session.ahead() == 1
    gate.set()
    assert finished(session).state == "done"
    assert session.score and session.score.caption == OTHER


def test_one_job_a_visitor_and_a_failure_is_a_sentence(bench: Bench) -> None:
    session, gate = Session(bench), threading.Event()
    bench.submit(Job(lambda studio, report: gate.wait() and None))
    session.ask_score(CAPTION)
    with pytest.raises(InputError, match="still at work"):
        session.ask_neurons(CAPTION)
    gate.set()
    assert finished(session).state == "done"

    def fail(studio: Studio, report: object) -> None:
        raise RuntimeError("no memory")

    broken = Job(fail)
    bench.submit(broken)
    wait_for(lambda: broken.over)
    assert (broken.state, "no memory" in broken.sentence) == ("failed", True)
    session.ask_score(CAPTION)  # the queue goes on
    assert finished(session).state == "done"


def test_a_model_that_is_not_there_says_so(studio: Studio) -> None:
    gate = threading.Event()

    def slow() -> Studio:
        gate.wait()
        return studio

    loading = Bench(slow)
    with pytest.raises(InputError, match="being loaded"):
        Session(loading).ask_score(CAPTION)
    gate.set()
    loading.close()

    def broken() -> Studio:
        raise InputError("--version x: cannot load x")

    failed = Bench(broken)
    wait_for(lambda: failed.state == "failed")
    with pytest.raises(InputError, match="could not be loaded: --version x: cannot load x"):
        Session(failed).ask_score(CAPTION)


def test_a_full_queue_takes_no_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was cancelled in line counts: it is kept until its turn comes."""
    monkeypatch.setattr("utils.app_session.MOST_WAITING", 2)
    gate = threading.Event()

    def hold(studio: Studio, report: Any) -> None:
        gate.wait()

    held, cancelled = Job(hold), Job(hold)
    bench.submit(held)
    bench.submit(cancelled)
    cancelled.cancel()
    with pytest.raises(InputError, match="Too many requests are waiting"):
        bench.submit(Job(hold))
    gate.set()
    wait_for(lambda: held.over)
    wait_for(lambda: not bench._waiting)
    last = Job(hold)
    bench.submit(last)
    wait_for(lambda: last.over)


def test_visitors_are_forgotten_by_age(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.app_session.MOST_VISITORS", 2)
    visitors = Visitors(bench)
    first, second = visitors.enter(), visitors.enter()
    assert visitors.find(first) is not visitors.find(second)
    visitors.find(first)
    third = visitors.enter()
    found = [visitors.find(name) is not None for name in (first, second, third)]
    assert found == [True, False, True]


# The command, on the small model that ships.


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Iterator[str]:
    """app.py serving the embedded model, with a threshold of a few prompts; its end is checked."""
    folder = tmp_path_factory.mktemp("app")
    for script, output, more in ((1, "s.pt", "0-19"), (2, "t.pt", "0-9")):
        options = ["--version=tiny", f"-o={folder / output}", f"--rows={more}"]
        options += [f"--samples_per_prompt={ROWS}"] if script == 2 else []
        done = warm.run(script, *options, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    started = subprocess.Popen(
        [
            sys.executable,
            "app.py",
            "--version=tiny",
            f"--statistics={folder / 's.pt'}",
            f"--threshold_file={folder / 't.pt'}",
            f"--samples_per_prompt={ROWS}",
            "--steps=6",
            "--port=0",
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a suite that was started in the background ignores SIGINT, and its children with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert started.stdout and started.stderr
    said = ""
    while not (found := re.search(r"http://\S+", said)):
        line = started.stdout.readline()
        assert line, started.stderr.read()
        said += line
    yield found.group()
    os.kill(started.pid, signal.SIGINT)
    _, wrong = started.communicate(timeout=60)
    assert started.returncode == 0 and wrong == "", wrong


def request(url: str, content: object = None, **headers: str) -> tuple[int, Any]:
    data = None if content is None else json.dumps(content).encode()
    headers = {"Content-Type": "application/json", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return answer.status, json.loads(answer.read() or "null")
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else text


def test_requests_from_elsewhere_are_refused(address: str) -> None:
    assert request(f"{address}/api", {}, Host="evil.example")[0] == 400
    assert request(f"{address}/api", {}, **{"Content-Type": "text/plain"})[0] == 400
    status, found = request(f"{address}/api", {})
    assert status == 200
    here = f"{address}/api/{found['name']}"
    assert request(f"{here}/score", [1])[1] == {"error": "The request is not a JSON object."}
    status, found = request(f"{here}/score", {"caption": "x" * 70_000})
    assert status == 400 and "64000 bytes" in found["error"]
    assert request(f"{here}/nothing", {})[0] == 404
    assert request(f"{here}/unblocked/0.png")[0] == 404
    assert request(f"{address}/api/unknown")[1] == {
        "error": "This session is over: open the page anew."
    }


def test_from_a_click_to_pictures(address: str) -> None:
    captions = [p.caption for p in read_prompts(ROOT / "prompts/tiny_memorized_prompts.csv")]
    with chromium() as browser:
        page, other = browser.new_page(), browser.new_page(color_scheme="dark")
        wrong = [watched(page), watched(other)]
        for visitor in (page, other):
            visitor.goto(address)
            visitor.locator("#model", has_text="is ready").wait_for(timeout=120_000)
        page.click("#score")
        assert page.inner_text("#error") == "Type a prompt first."

        page.click(f"#examples button:has-text('{captions[0]}')")
        page.locator("#factor").focus()
        page.keyboard.press("Home")
        assert page.inner_text("#factor-shown") == "-1"
        page.keyboard.press("End")
        page.fill("#samples", "2")
        page.click("#pictures")
        other.fill("#caption", "<b>a quiet harbour</b>")
        other.keyboard.press("Tab")
        other.click("#score")

        page.locator("#blocked img").nth(1).wait_for(timeout=120_000)
        page.locator("#progress").wait_for(state="hidden", timeout=120_000)
        assert captions[0] in page.inner_text("#verdict")
        assert "above the threshold" in page.inner_text("#verdict")
        assert page.locator("#layers tbody tr").count() > 0
        assert page.inner_text("#blocked-title") == "Located neurons times 1"
        decoded = "i => i.decode().then(() => i.naturalWidth)"
        sizes = page.eval_on_selector_all(
            ".strip img", f"images => Promise.all(images.map({decoded}))"
        )
        assert sizes == [64] * 4  # two with, two without
        shown = page.eval_on_selector_all(".strip img", "images => images.map(i => i.src)")
        first = page.evaluate(BYTES_OF, [shown[0], shown[2]])
        assert first[0] == first[1]  # a factor of 1 changes nothing

        page.locator("#factor").fill("0")
        page.click("#pictures")
        page.locator("#blocked-title", has_text="times 0").wait_for(timeout=120_000)
        shown = page.eval_on_selector_all(".strip img", "images => images.map(i => i.src)")
        second = page.evaluate(BYTES_OF, [shown[0], shown[2]])
        assert second[0] == first[0] and second[1] != first[1]

        page.click("#edit")
        exported = page.locator("#diff", has_text="(neurons times 0)")
        exported.wait_for(timeout=120_000)
        page.locator("#factor").fill("0.5")
        with page.expect_download() as diff:
            exported.click()  # still called what it is
        assert diff.value.suggested_filename == "edit.safetensors"

        other.locator("#verdict", has_text="<b>a quiet harbour</b>").wait_for(timeout=120_000)
        assert other.locator("#found-neurons").is_hidden()
        with page.expect_download() as csv:
            page.click("#csv")
        assert csv.value.suggested_filename == "located_neurons.csv"
        assert wrong == [[], []]


def test_a_look_that_fails_is_not_the_last(address: str) -> None:
    over = {"error": "This session is over: open the page anew."}
    looks = re.compile("/api/[^/]+$")
    with chromium() as browser:
        page = browser.new_page()
        page.goto(address)
        page.locator("#model", has_text="is ready").wait_for(timeout=120_000)
        page.fill("#caption", "a quiet harbour")
        page.route(looks, lambda route: route.abort(), times=1)
        page.click("#score")
        page.locator("#model", has_text="does not answer").wait_for()
        assert page.locator("#cancel").is_visible()
        page.locator("#verdict", has_text="a quiet harbour").wait_for(timeout=120_000)
        assert "is ready" in page.inner_text("#model")

        page.locator("#progress").wait_for(state="hidden")
        page.route(looks, lambda route: route.fulfill(status=404, json=over), times=1)
        page.click("#score")
        page.locator("#error", has_text=over["error"]).wait_for()
        assert page.locator("#cancel").is_hidden()


BYTES_OF = """async (addresses) => Promise.all(addresses.map(async (address) => {
  const data = await (await fetch(address)).arrayBuffer();
  return Array.from(new Uint8Array(data)).join();
}))"""


def test_an_address_that_is_taken_or_none_is_named() -> None:
    with listening_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for host, number in (("127.0.0.1", port), ("::1", 0), ("ä..b", 0)):
            with pytest.raises(InputError, match=f"--host {host} --port {number}: cannot listen"):
                listening_socket(host, number)


@pytest.mark.parametrize(
    ("host", "hosts", "others_reach_it"),
    [
        ("127.0.0.1", ["127.0.0.1", "127.0.0.1", "127.0.0.1", "localhost"], False),
        ("localhost", ["localhost", "127.0.0.1", "127.0.0.1", "localhost"], False),
        ("0.0.0.0", ["*"], True),
        ("0", ["*"], True),
        ("", ["*"], True),
    ],
)
def test_the_address_itself_says_who_is_let_in(
    host: str, hosts: list[str], others_reach_it: bool
) -> None:
    with listening_socket(host, 0) as bound:
        assert hosts_of(bound, host) == hosts and is_open(bound) == others_reach_it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--version=nothing"], "not a short name"),
        (["--version=tiny", "--host="], "--host: names no address"),
        (["--version=tiny", "--statistics=none.pt"], "1_compute_activations_statistics.py"),
        # statistics are read after the other checks, since that imports torch
        (
            ["--version=tiny", "--statistics=LICENSE", "--threshold_file=none.pt"],
            "2_compute_pairwise_ssim.py",
        ),
        # of v1-4 the threshold is known
        (
            ["--version=v1-4", "--statistics=LICENSE", "--dry_run"],
            "LICENSE: not a statistics file",
        ),
        (["--version=tiny", "--port=70000"], "70000 is not within"),
        (["--version=tiny", "--exchanged_guidance"], "nothing is exchanged"),
    ],
)
def test_bad_options_are_one_line(options: list[str], said: str) -> None:
    done = run(ROOT / "app.py", *options, cwd=ROOT)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """Before the statistics are read, which would be refused."""
    (tmp_path / f"{package}.py").write_text(f"raise ImportError(name='{package}')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run(ROOT / "app.py", "--version=v1-4", "--statistics=LICENSE", cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    said = f"{package} is not installed; run: pip install -r requirements-app.txt"
    assert done.stderr == f"app.py: {said}\n"


def test_make_installs_anew_when_the_page_needs_something_else() -> None:
    """Each file that requirements-dev.txt includes is one that the installation depends on."""
    included = re.findall(r"^-r (\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    rules = (ROOT / "Makefile").read_text().splitlines()
    (rule,) = (line for line in rules if line.startswith("$(INSTALLED_DEV):"))
    assert included and set(included) <= set(rule.split())


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    """With one line, as other bad input does: of a hub model only loading tells."""
    torch.save(([torch.zeros(2)], [torch.ones(2)]), tmp_path / "s.pt")
    done = subprocess.run(
        [sys.executable, str(ROOT / "app.py"), "--version=v1-4", "--statistics=s.pt", "--port=0"],
        cwd=tmp_path,
        env=environment() | {"HF_HUB_CACHE": str(tmp_path)},  # offline, and nothing in it
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "Open http://" in done.stdout, done.stderr
    assert done.stderr.startswith("app.py: --version v1-4: cannot load"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [("--steps=50", "--num_inference_steps=20"), ("--steps=20",)])
def test_more_steps_than_timesteps_are_refused_before_a_request(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Of pictures as of noise differences, which have 50 unless told otherwise."""
    shutil.copytree(ROOT / "tiny_model/pipeline", tmp_path / "model")
    path = tmp_path / "model/scheduler/scheduler_config.json"
    write_json(path, read_json(path) | {"num_train_timesteps": 40})
    done = run(ROOT / "app.py", "--version=model", *options, "--dry_run", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert "50 steps asked for, but the model has 40 timesteps" in done.stderr
