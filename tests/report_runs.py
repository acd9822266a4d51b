"""Makes run folders for tests of the report: the files that the scripts write, with given content.

Pictures are smooth drawings with grain, which compress about as photographs do.
"""

import functools
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import sha256_of_file, write_json, write_table
from utils.images import image_name
from utils.neuron_sets import RESULT_COLUMNS, Result, result_cells

HOSTILE = "<script>document.title = 'taken'</script> & \"quotes\""


@functools.cache
def drawn(seed: int, side: int) -> bytes:
    """A smooth random field with grain, (side, side) pixels, as JPEG."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    grain = smooth + generator.normal(0, 12, smooth.shape)
    buffer = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def picture(path: Path, *, seed: int, side: int) -> None:
    """One of 50 drawings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn(seed % 50, side))


def located(row: int, caption: str) -> Result:
    """Row r has r % 4 neurons before and after refinement one candidate fewer; none: not
    memorized."""
    count = row % 4
    refined = [list(range(count)), [], [5] if count else []]
    initial = [list(range(count + 1)), [], [5]] if count else [[], [], []]
    if not count:
        return Result(row, caption, "", initial, 0.0, refined, 0.0)
    return Result(row, caption, "", initial, 0.2 + row / 10_000, refined, 0.3 + row / 10_000)


def make_run(folder: Path, prompts: int, *, samples: int, side: int) -> Path:
    """A run under the scripts' default names, every part of it there. Prompt 1 has a hostile
    caption, the others are 'Prompt number N'."""
    captions = [f"Prompt number {row}" for row in range(prompts)]
    captions[1] = HOSTILE
    kinds = ["VM" if row % 3 else "TM" for row in range(prompts)]
    rows = list(range(prompts))
    for name in ("results", "statistics", "prompts"):
        (folder / name).mkdir(parents=True)
    prompt_file = folder / "prompts" / "memorized.csv"
    write_table(
        prompt_file, ["Caption", "URL", "type"], [[captions[r], "", kinds[r]] for r in rows]
    )
    results = folder / "results" / "memorization_statistics_small.csv"
    write_table(results, RESULT_COLUMNS, [result_cells(located(r, captions[r])) for r in rows])

    def record(path: Path, *inputs: Path, **more: object) -> None:
        write_json(
            path,
            {
                "script": "3_detect_memorized_neurons.py",
                "settings": {"pairwise_ssim_threshold": 0.4},
                "model": {"version": "small", "id": "small/pipeline"},
                "inputs": {str(p.relative_to(folder)): sha256_of_file(p) for p in inputs},
                "finished": True,
                "command": f"python make.py {path.stem}",
                "git_commit": "0" * 40,
                "packages": {"torch": "2"},
                "python": "3.11",
                "seconds": 1.5,
                **more,
            },
        )

    record(results.with_suffix(".json"), prompt_file)
    write_table(
        folder / "results" / "memorization_scores_small.csv",
        ["Caption", "URL", "Score", "Seed Rows", "Row"],
        [[captions[r], "", f"{0.3 + r / prompts / 2:.6f}", "2", r] for r in reversed(rows)],
    )
    record(folder / "results" / "memorization_scores_small.json", prompt_file)
    for offset, (name, mode, source) in enumerate(
        (
            ("unblocked", "original_images", prompt_file),
            ("blocked", "refined_neurons", results),
        )
    ):
        images = folder / "generated_images" / f"small_{name}"
        for row in rows:
            for sample in range(samples):
                seed = 25 * offset + 7 * row + sample
                picture(images / image_name(row, sample), seed=seed, side=side)
        settings = {"mode": mode, "scaling_factor": 0.0}
        record(images / "config.json", source, settings=settings)
    for row in rows:
        place = folder / "original_images" / f"{row:04d}_first_image.jpg"
        picture(place, seed=3 * row, side=side)
    metrics = folder / "results" / "metrics_small"
    write_table(
        metrics / "sscd_orig_unblocked.csv",
        ["Row", "Caption", "type", "Max", "Median", "Samples"],
        [[r, captions[r], kinds[r], f"{1 - r / prompts:.6f}", "", samples] for r in rows],
    )
    spread = {"median": 0.5, "mad": 0.25, "n": prompts, "missing": 0, "interval": [0.4, 0.6]}
    none = {"median": None, "mad": None, "n": 0, "missing": prompts, "interval": None}
    shares = {"prompts": 3, "of_prompts": prompts, "pictures": 5, "of_pictures": samples * prompts}
    record(
        metrics / "sscd_orig_unblocked.json",
        script="compute_sscd_orig.py",
        metric="SSCD_Orig (nemo)",
        inputs={"generated_images/small_unblocked": "", "original_images": ""},
        scores={"Max": {"all": spread}, "Median": {"all": none}},
        copies={"nemo": {"all": shares}},
    )
    record(metrics / "quality.json", metric="Quality", table=["FID   1.25", "<b>KID</b>"])
    write_table(folder / "tables" / "main_results.csv", ["Method", "Copies"], [["none", "0.8"]])
    (folder / "figures").mkdir()
    Image.new("RGB", (320, 200), "white").save(folder / "figures" / "score_distribution.png")
    write_table(
        metrics / "attack_zero.csv",
        ["Row", "Caption", "type", "Start", "Steps", "Max", "Median", "Share Above 0.7"],
        [
            [2, captions[2], kinds[2], "prompt", steps, share, share, share]
            for steps, share in ((0, 0.0), (50, 0.75), (500, 1.0))
        ],
    )
    (folder / "other.json").write_text(json.dumps({"not": "a part"}), encoding="utf-8")
    return folder
