"""What is said about LoRA beyond language: on a vision transformer and on a diffusion model."""

from ..experiments.beyond_figures import Found, found, permutations, sizes
from ..experiments.beyond_tasks import CLASSIFIED, DRAWN, planted
from .claim import FAILS, HOLDS, OVERVIEW, Claim, Rows, Verdict

BEYOND = "figures/beyond-language/rows.jsonl"
MOST = 0.9  # of the way to all weights


def furthest(f: Found, task: str) -> tuple[float, int]:
    """The largest part of the way to all weights that a rank goes, in medians, and that rank."""
    return max(((f.closed(task, r), r) for r in f.ranks(task)), key=lambda pair: pair[0])


def on_vision_transformers(rows: Rows) -> Verdict:
    """Holds when some rank closes 90 % of the way from the head alone to all weights, in test images that
    are classified right, in medians, on each task.
    """
    f = found(rows)
    most = {task: furthest(f, task) for task in CLASSIFIED}
    number = ", ".join(f"{task} {part:.0%} at r = {r}" for task, (part, r) in most.items())
    works = [task for task, (part, _) in most.items() if part >= MOST]
    if len(works) == len(most):
        return HOLDS, number
    return f"holds when the task is {' or '.join(works)}" if works else FAILS, number


def on_diffusion_models(rows: Rows) -> Verdict:
    """Holds if some rank closes 90 % of the way from the base to all weights, in drawings whose nearest
    training image shows a new digit, in medians.
    """
    f = found(rows)
    part, r = furthest(f, DRAWN)
    return HOLDS if part >= MOST else FAILS, f"at most {part:.0%} of the way, at r = {r}"


def four_is_most(rows: Rows) -> Verdict:
    """Holds if r = 4 closes 90 % of the way to all weights on each task: in test images that are classified
    right, from the head alone; in drawings of a new digit, from the base; each in medians.
    """
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
    """Holds if the effective rank of the median spectrum of what full fine-tuning adds is below a quarter of
    the width, for both models.
    """
    f = found(rows)
    parts = {task: sizes(f, task) for task in (CLASSIFIED[0], DRAWN)}
    noise = next(iter(parts.values()))[2]
    number = ", ".join(f"{task} {full:.0%}" for task, (_, full, _) in parts.items())
    low = all(full < 0.25 for _, full, _ in parts.values())
    return HOLDS if low else FAILS, f"{number} of the width; noise in a square map {noise:.0%}"


CLAIMS = (
    Claim("LoRA works for vision transformers.", OVERVIEW,
          BEYOND, "figures/beyond-language/ranks.png", on_vision_transformers),
    Claim("LoRA works for diffusion models.", OVERVIEW,
          BEYOND, "figures/beyond-language/drawings.png", on_diffusion_models),
    Claim("On images r = 4 goes 90% of the way to all weights.", "asked here",
          BEYOND, "figures/beyond-language/ranks.png", four_is_most),
    Claim("On images, too, LoRA needs the rank that a task has, and no more.", "Eckart and Young 1936",
          BEYOND, "figures/beyond-language/spectra.png", images_need_the_planted_rank),
    Claim("What full fine-tuning on images adds to a matrix is of low rank.", OVERVIEW,
          BEYOND, "figures/beyond-language/spectra.png", updates_are_of_low_rank),
)  # fmt: skip
