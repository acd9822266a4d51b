"""What ``app.py`` does for its visitors: one model, one queue, and each visitor's own findings.

Neurons are switched off by hooks on the one U-Net, so all work on a model is done by one thread, in
the order in which it was asked for; visitors share nothing else. A visitor's thread only reads.
Public: ``Studio``, ``Score``, ``Located``, ``Pictures``, ``Edit``, ``CancelledError``, ``Job``,
``Bench``, ``Session``, ``Visitors``, ``result_table``.
"""

import io
import json
import queue
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import InputError
from utils.files import format_row
from utils.localization import Search, Thresholds, UndecidedError, kept_rows
from utils.neuron_sets import RESULT_COLUMNS, NeuronSet, Result, result_cells, size

if TYPE_CHECKING:
    from utils.activation_statistics import Statistics
    from utils.scoring import Detector
    from utils.stable_diffusion import Model

GUIDANCE = 7.0  # of pictures, as in script 4
LONGEST_CAPTION = 2000  # characters; the model reads some 75 tokens of them
MOST_SAMPLES = 8
FACTORS = (-1.0, 1.0)  # paper table 4
MOST_WAITING = 256  # jobs, those that were cancelled in line included
MOST_VISITORS = 64  # whose findings are kept; whoever was away longest goes first
STAGES = {
    "scoring": "Scoring the prompt",
    "selection": "Collecting candidate neurons",
    "layers": "Giving whole layers back",
    "neurons": "Giving single neurons back",
}

# Hears of progress before each unit of work: (what is done, units done, units in all or None).
# It raises CancelledError where the visitor has asked for an end.
Report = Callable[[str, int, int | None], None]


class CancelledError(Exception):
    """The visitor asked for an end."""


@dataclass(frozen=True)
class Score:
    """How alike a prompt's noise differences are over seeds. ``note``: what the visitor should
    know, or empty."""

    caption: str
    value: float
    threshold: float
    note: str

    @property
    def memorized(self) -> bool:
        """Whether the best pair of seed rows is strictly above the threshold."""
        return self.value > self.threshold


@dataclass(frozen=True)
class Located:
    """A score, and the neurons found: sets are empty where the prompt is not memorized."""

    score: Score
    initial: NeuronSet
    initial_score: float
    refined: NeuronSet
    refined_score: float
    evaluations: int


@dataclass(frozen=True)
class Pictures:
    """PNG files of one prompt from the same noises: all neurons on, and the located ones multiplied
    by ``factor`` (none where no neurons were located). ``lost``: how many were not finite."""

    caption: str
    seed: int
    samples: int
    factor: float
    unblocked: tuple[bytes, ...]
    blocked: tuple[bytes, ...]
    lost: int


@dataclass(frozen=True)
class Edit:
    """The located neurons multiplied by ``factor``, as a diff."""

    factor: float
    data: bytes


@dataclass(frozen=True)
class Studio:
    """A loaded model and what belongs to it. Its methods use the U-Net: one at a time."""

    model: "Model"
    detector: "Detector"
    statistics: "Statistics"
    threshold: float
    samples_per_prompt: int
    steps: int  # of pictures
    search: Search = field(default_factory=Search)

    def score(self, caption: str, report: Report) -> Score:
        """Raises UndecidedError for a model or prompt that gives values that are not finite."""
        report(STAGES["scoring"], 0, 1)
        pairwise = self.detector.pairwise(caption)
        kept_rows(pairwise, self.samples_per_prompt, self.threshold)  # raises where not finite
        return Score(caption, pairwise.max().item(), self.threshold, self._note(caption))

    def locate(self, caption: str, report: Report) -> Located:
        """Script 3's search, ``exact``. Raises UndecidedError."""

        def hear(stage: str, left: int, evaluations: int) -> None:
            candidates = f", {left} candidates" if left else ""
            text = f"{STAGES[stage]}{candidates}, {evaluations} evaluations"
            report(text, evaluations, None)

        tau = self.threshold
        finding = self.detector.find(
            caption,
            self.statistics,
            search=self.search,
            thresholds=Thresholds(tau, tau, tau),
            report=hear,
        )
        score = Score(caption, finding.pairwise.max().item(), tau, self._note(caption))
        if finding.outcome is None:
            nothing: NeuronSet = [[] for _ in self.model.value_layers]
            return Located(score, nothing, 0.0, nothing, 0.0, finding.evaluations)
        found = finding.outcome
        return Located(
            score,
            found.initial,
            found.initial_score,
            found.refined,
            found.refined_score,
            finding.evaluations,
        )

    def pictures(
        self,
        caption: str,
        neurons: NeuronSet,
        *,
        factor: float,
        samples: int,
        seed: int,
        report: Report,
        known: Pictures | None = None,
    ) -> Pictures:
        """``samples`` pictures with and without the neurons. The former are taken from ``known``
        where they are the same."""
        rounds: list[tuple[str, NeuronSet, float]] = []
        same = known is not None and (caption, seed, samples) == (
            known.caption,
            known.seed,
            known.samples,
        )
        if not same:
            rounds.append(("Pictures, all neurons on", [[] for _ in neurons], 1.0))
        if size(neurons):
            rounds.append((f"Pictures, neurons times {factor:g}", neurons, factor))
        made = [
            self._sampled(caption, blocked, by, samples, seed, stage, report)
            for stage, blocked, by in rounds
        ]
        unblocked = known.unblocked if same and known else made.pop(0)
        blocked = made.pop(0) if made else ()
        expected = samples * (2 if size(neurons) else 1)
        lost = expected - len(unblocked) - len(blocked)
        return Pictures(caption, seed, samples, factor, unblocked, blocked, lost)

    def _sampled(
        self,
        caption: str,
        neurons: NeuronSet,
        factor: float,
        samples: int,
        seed: int,
        stage: str,
        report: Report,
    ) -> tuple[bytes, ...]:
        from utils.stable_diffusion import (
            decode,
            encode_prompt,
            encode_unconditional,
            initial_noise,
            sample_latents,
        )
        from utils.value_layers import deactivated

        done = 0

        def hear(step: object) -> None:
            nonlocal done
            report(stage, done, self.steps)
            done += 1

        model = self.model
        report(stage, 0, self.steps)
        with deactivated(model.value_layers, [neurons], factor=factor):
            latents = sample_latents(
                model,
                encode_prompt(model, caption).repeat(samples),
                encode_unconditional(model),
                initial_noise(model, samples, seed),
                steps=self.steps,
                guidance_scale=GUIDANCE,
                observe=hear,
            )
        return tuple(_png(picture) for picture in decode(model, latents) if picture is not None)

    def _note(self, caption: str) -> str:
        tokenizer = self.model.pipeline.tokenizer
        most = tokenizer.model_max_length
        tokens = len(tokenizer(caption, truncation=False, verbose=False).input_ids)
        if tokens <= most:
            return ""
        return f"The model reads {most} tokens; the last {tokens - most} of this prompt are cut."

    def diff(self, located: Located, factor: float) -> bytes:
        """The edit as a diff that ``5_edit_model.py --apply`` takes, in mode ``zero``."""
        from utils.edited_weights import (
            StoredWeights,
            revision_of,
            unet_files,
            unet_folder,
            write_diff,
        )
        from utils.editing import MODES, EditedPrompt, Job

        source, mode = self.model.source, MODES["zero"]
        # of the commit that was loaded: the branch may have moved on
        folder = unet_folder(replace(source, revision=self.model.commit or source.revision))
        weights = StoredWeights(unet_files(folder))
        prompt = EditedPrompt(0, located.score.caption, located.refined)
        options = {"scaling_factor": factor}
        job = Job(source, located.refined, [prompt], [], options, str(self.model.device))
        changes, findings = mode.edit(job, weights)
        identity = {
            "mode": "zero",
            "does": mode.does,
            "equal": mode.equal,
            "neurons": str(size(located.refined)),
            "prompts": "1",
            "options": json.dumps(options),
            "findings": json.dumps(findings),
            "base_id": source.id,
            "base_revision": revision_of(source, folder) or "",
        }
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "edit.safetensors"
            write_diff(path, weights, changes, identity=identity)
            return path.read_bytes()


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def result_table(located: Located) -> str:
    """A result file of script 3 with this one prompt, which script 4 reads."""
    found = Result(
        0,
        located.score.caption,
        "",
        located.initial,
        located.initial_score,
        located.refined,
        located.refined_score,
    )
    return format_row(RESULT_COLUMNS) + format_row(result_cells(found))


class Job:
    """One request for the model: waiting, running, and then done, failed or cancelled."""

    def __init__(self, work: Callable[[Studio, Report], None]) -> None:
        self.state = "waiting"
        self.stage = ""
        self.done = 0
        self.total: int | None = None
        self.sentence = ""  # why it failed
        self._work = work
        self._asked_to_end = threading.Event()
        self._begins = threading.Lock()  # a job that is cancelled in line never begins

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ("done", "failed", "cancelled")

    def cancel(self) -> None:
        """Ends the job before its next unit of work; at once where it has not begun."""
        self._asked_to_end.set()
        with self._begins:
            if self.state == "waiting":
                self.state = "cancelled"

    def run(self, studio: Studio) -> None:
        """Does the work; whatever goes wrong becomes a sentence."""
        with self._begins:
            if self.over:
                return
            self.state = "running"
        try:
            self._work(studio, self._report)
            self.state = "done"
        except CancelledError:
            self.state = "cancelled"
        except UndecidedError:
            self.sentence = (
                "The model gives values that are not finite for this prompt, so that it can be "
                "called neither memorized nor not; try another prompt or --dtype=float32."
            )
            self.state = "failed"
        except InputError as error:
            self.sentence, self.state = str(error), "failed"
        except Exception as error:
            # The queue outlives a request that fails: the next visitor is served.
            self.sentence = f"This did not work: {type(error).__name__}: {error}"[:300]
            self.state = "failed"

    def _report(self, stage: str, done: int, total: int | None) -> None:
        if self._asked_to_end.is_set():
            raise CancelledError
        self.stage, self.done, self.total = stage, done, total


class Bench:
    """The one thread that uses the model. ``load`` is called in it first; requests that come
    meanwhile are refused. ``error``: what it raised, None where it has not."""

    def __init__(self, load: Callable[[], Studio]) -> None:
        self.state = "loading"  # then "ready" or "failed"
        self.sentence = "The model is being loaded; try again when it is ready."
        self.error: Exception | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []  # the running one is the first
        self._thread = threading.Thread(target=self._serve, args=(load,), daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Puts a job at the end of the queue. InputError while there is no model, and where the
        queue is full: sessions that were pushed out leave their jobs in it."""
        if self.state != "ready":
            raise InputError(self.sentence)
        if len(self._waiting) >= MOST_WAITING:
            raise InputError("Too many requests are waiting; try again later.")
        self._waiting.append(job)
        self._jobs.put(job)

    def ahead(self, job: Job) -> int:
        """How many jobs are before this one, without those that were cancelled in line."""
        waiting = [other for other in list(self._waiting) if not other.over]
        return waiting.index(job) if job in waiting else 0

    def close(self, *, wait: float = 10.0) -> None:
        """Cancels what there is and ends the thread, which may take a pass of the model: ``wait``
        seconds at the most."""
        for job in list(self._waiting):
            job.cancel()
        self._jobs.put(None)
        self._thread.join(wait)

    def _serve(self, load: Callable[[], Studio]) -> None:
        try:
            studio = load()
        except Exception as error:
            self.sentence, self.state = f"The model could not be loaded: {error}", "failed"
            self.error = error
            return
        self.sentence, self.state = "", "ready"
        while (job := self._jobs.get()) is not None:
            job.run(studio)
            self._waiting.remove(job)


class Session:
    """One visitor: the latest findings, and at most one job at a time."""

    def __init__(self, bench: Bench) -> None:
        self.score: Score | None = None
        self.located: Located | None = None
        self.pictures: Pictures | None = None
        self.edit: Edit | None = None
        self.job: Job | None = None
        self._bench = bench
        self._lock = threading.Lock()

    def ask_score(self, caption: object) -> None:
        """Queues the scoring of a prompt. This and the next three raise InputError, with a sentence
        for the visitor, for bad input, while there is no model, and while a job of theirs runs."""
        text = checked_caption(caption)

        def work(studio: Studio, report: Report) -> None:
            score = studio.score(text, report)
            self._forget_others(text)
            self.score = score

        self._submit(work)

    def ask_neurons(self, caption: object) -> None:
        """Queues the search for a prompt's neurons."""
        text = checked_caption(caption)

        def work(studio: Studio, report: Report) -> None:
            self._locate(studio, text, report)

        self._submit(work)

    def ask_pictures(self, caption: object, factor: object, samples: object, seed: object) -> None:
        """Queues pictures with and without a prompt's neurons, which are located first where they
        are not yet."""
        text = checked_caption(caption)
        by = checked_number(factor, "factor", *FACTORS)
        count = checked_whole(samples, "number of pictures", 1, MOST_SAMPLES)
        number = checked_whole(seed, "seed", 0, 2**63 - 1)

        def work(studio: Studio, report: Report) -> None:
            located = self.located
            if located is None or located.score.caption != text:
                located = self._locate(studio, text, report)
            self.pictures = studio.pictures(
                text,
                located.refined,
                factor=by,
                samples=count,
                seed=number,
                report=report,
                known=self.pictures,
            )

        self._submit(work)

    def ask_edit(self, factor: object) -> None:
        """Queues the export of the located neurons, multiplied by a factor, as a diff."""
        by = checked_number(factor, "factor", *FACTORS)
        located = self.known_neurons()

        def work(studio: Studio, report: Report) -> None:
            report("Writing the edit", 0, None)
            self.edit = Edit(by, studio.diff(located, by))

        self._submit(work, withdraw_edit=True)

    def known_neurons(self) -> Located:
        """What was located. InputError where nothing was."""
        located = self.located
        if located is None:
            raise InputError("No neurons have been located yet: locate them first.")
        if not size(located.refined):
            raise InputError("This prompt is not memorized: there are no neurons to export.")
        return located

    def cancel(self) -> None:
        """Ends the visitor's job, if there is one."""
        if self.job is not None:
            self.job.cancel()

    def ahead(self) -> int:
        """How many jobs of others are before the visitor's."""
        return self._bench.ahead(self.job) if self.job is not None else 0

    def _submit(
        self, work: Callable[[Studio, Report], None], *, withdraw_edit: bool = False
    ) -> None:
        with self._lock:
            if self.job is not None and not self.job.over:
                raise InputError("Your last request is still at work: wait for it or cancel it.")
            job = Job(work)
            # Before the job can bring another one; until then nobody else writes here.
            edit, self.edit = self.edit, None if withdraw_edit else self.edit
            try:
                self._bench.submit(job)
            except InputError:
                self.edit = edit
                raise
            self.job = job

    def _locate(self, studio: Studio, caption: str, report: Report) -> Located:
        located = studio.locate(caption, report)
        self._forget_others(caption)
        self.score, self.located, self.edit = located.score, located, None
        return located

    def _forget_others(self, caption: str) -> None:
        """What was found for another prompt must not stand beside this one."""
        if self.located is not None and self.located.score.caption != caption:
            self.located = self.edit = None
        if self.pictures is not None and self.pictures.caption != caption:
            self.pictures = None


class Visitors:
    """Sessions by their secret names, as many as ``MOST_VISITORS``."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def enter(self) -> str:
        """A new session's name."""
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._sessions[name] = Session(self._bench)
            while len(self._sessions) > MOST_VISITORS:
                _, gone = self._sessions.popitem(last=False)
                gone.cancel()
        return name

    def find(self, name: str) -> Session | None:
        """The session, None if there is none (any more)."""
        with self._lock:
            if name in self._sessions:
                self._sessions.move_to_end(name)
            return self._sessions.get(name)


# What visitors may ask for.


def checked_caption(value: object) -> str:
    """The caption exactly as given. InputError with a sentence."""
    if not isinstance(value, str) or not value.strip():
        raise InputError("Type a prompt first.")
    if len(value) > LONGEST_CAPTION:
        raise InputError(
            f"This prompt has {len(value)} characters; {LONGEST_CAPTION} are the most."
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError("This prompt holds half a character (a lone surrogate); type it anew.")
    return value


def checked_number(value: object, what: str, low: float, high: float) -> float:
    """A number within the bounds. InputError with a sentence."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"The {what} must be a number from {low:g} to {high:g}.")
    return float(value)


def checked_whole(value: object, what: str, low: int, high: int) -> int:
    """A whole number within the bounds. InputError with a sentence."""
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"The {what} must be a whole number from {low} to {high}.")
    return value


def examples(captions: Sequence[str]) -> list[str]:
    """A few prompts to begin with."""
    return list(dict.fromkeys(captions))[:6]
