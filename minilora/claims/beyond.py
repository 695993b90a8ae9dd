"""What is said about LoRA beyond language: on a vision transformer and on a diffusion model."""

from ..experiments.beyond_figures import Found, found, permutations, sizes
from ..experiments.beyond_tasks import CLASSIFIED, DRAWN, planted
from .claim import FAILS, HOLDS, HU, OVERVIEW, Claim, Rows, Verdict

BEYOND = "figures/beyond-language/rows.jsonl"
MOST = 0.9  # of the way to all weights


def enough(f: Found, task: str) -> int | None:
    """The smallest rank that goes most of the way to all weights, in medians."""
    return min((r for r in f.ranks(task) if f.closed(task, r) >= MOST), default=None)


def on_vision_transformers(rows: Rows) -> Verdict:
    """Holds when some rank closes 90 % of the way from the head alone to all weights, in test images that
    are classified right, in medians, on each task.
    """
    f = found(rows)
    least = {task: enough(f, task) for task in CLASSIFIED}
    number = ", ".join(f"{task}: {f'r = {r}' if r else 'no rank'}" for task, r in least.items())
    works = [task for task, r in least.items() if r]
    if len(works) == len(least):
        return HOLDS, number
    return f"holds when the task is {' or '.join(works)}" if works else FAILS, number


def on_diffusion_models(rows: Rows) -> Verdict:
    """Holds if some rank closes 90 % of the way from the base to all weights, in drawings whose nearest
    training image shows a new digit, in medians.
    """
    f = found(rows)
    most = max(f.ranks(DRAWN), key=lambda r: f.closed(DRAWN, r))
    number = f"at most {f.closed(DRAWN, most):.0%} of the way, at r = {most}"
    return HOLDS if enough(f, DRAWN) else FAILS, number


def four_is_most(rows: Rows) -> Verdict:
    """Holds if r = 4 closes 90 % of the way, as above, on each task of both models."""
    f = found(rows)
    parts = {task: f.closed(task, 4) for task in (*CLASSIFIED, DRAWN)}
    number = ", ".join(f"{task} {part:.0%}" for task, part in parts.items())
    return HOLDS if min(parts.values()) >= MOST else FAILS, number


def images_need_the_planted_rank(rows: Rows) -> Verdict:
    """Holds if for each permutation of pixels the planted rank is the first that leaves at most 2 % of the
    base's loss, in the median.
    """
    f = found(rows)
    elbows = {planted(task): f.elbow(task) for task in permutations(f)}
    number = ", ".join(f"planted {k}: {f'r = {r}' if r else 'no rank'}" for k, r in elbows.items())
    return HOLDS if all(k == r for k, r in elbows.items()) else FAILS, number


def updates_are_of_low_rank(rows: Rows) -> Verdict:
    """Holds if the effective rank of what full fine-tuning adds is below a quarter of the width, for both
    models, in the median map.
    """
    f = found(rows)
    parts = {task: sizes(f, task) for task in (CLASSIFIED[0], DRAWN)}
    noise = next(iter(parts.values()))[2]
    number = ", ".join(f"{task} {full:.0%}" for task, (_, full, _) in parts.items())
    low = all(full < 0.25 for _, full, _ in parts.values())
    return HOLDS if low else FAILS, f"{number} of the width; noise {noise:.0%}"


CLAIMS = (
    Claim("LoRA works for vision transformers.", OVERVIEW,
          BEYOND, "figures/beyond-language/ranks.png", on_vision_transformers),
    Claim("LoRA works for diffusion models.", OVERVIEW,
          BEYOND, "figures/beyond-language/drawings.png", on_diffusion_models),
    Claim("On images, too, a rank of 4 captures most of the adaptation.", OVERVIEW,
          BEYOND, "figures/beyond-language/ranks.png", four_is_most),
    Claim("On images, too, LoRA needs the rank that a task has, and no more.", HU,
          BEYOND, "figures/beyond-language/spectra.png", images_need_the_planted_rank),
    Claim("What full fine-tuning on images adds to a matrix is of low rank.", HU,
          BEYOND, "figures/beyond-language/spectra.png", updates_are_of_low_rank),
)  # fmt: skip
