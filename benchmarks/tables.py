"""Writes the pages' tables from benchmarks/results, so that none can drift from its run.

python benchmarks/tables.py          rewrites the tables in README.md and docs/*.md
python benchmarks/tables.py --check  fails when these do not hold them as they should be

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import pathlib
import re
from collections.abc import Callable, Sequence

from absl import app, flags

import attribution_tables as attribution
import inverse_tables as inverses
import scaling_tables as scaling
import speed_tables as speed
import text_tables as text
import translation_tables as translation

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_CHECK = flags.DEFINE_bool("check", False, "Compare the pages, and write nothing.")


TABLES: dict[str, Callable[[], str]] = {
    "mnist-large_cnn": lambda: attribution.mislabeled("mnist-large_cnn"),
    "fashion_mnist-large_cnn": lambda: attribution.mislabeled("fashion_mnist-large_cnn"),
    "mnist-small_cnn": lambda: attribution.mislabeled("mnist-small_cnn"),
    "fashion_mnist-small_cnn": lambda: attribution.mislabeled("fashion_mnist-small_cnn"),
    "digits-large_cnn": lambda: attribution.mislabeled("digits-large_cnn"),
    "loss-and-gradient": attribution.loss_and_gradient,
    "datamodels": attribution.datamodels,
    "removals": attribution.removals,
    "stacking": attribution.stacking,
    "recording": attribution.recording,
    "arnoldi-overhead": speed.arnoldi_overhead,
    "iteration": speed.iteration,
    "arnoldi-storage": speed.arnoldi_storage,
    "growth": scaling.growth,
    "projection": speed.projection,
    "curvature": speed.curvature,
    "index": speed.index,
    "ekfac": speed.ekfac,
    "coverage": speed.coverage,
    "large": scaling.large,
    "conjugate-gradient": inverses.conjugate_gradient,
    "inverses": inverses.inverses,
    "inverses-details": inverses.inverses_details,
    "fashion": inverses.fashion,
    "plan": scaling.plan,
    "plan-errors": scaling.plan_errors,
    "tpu-compile": scaling.tpu_compile,
    "scaling": scaling.scaling,
    "qnli": text.qnli,
    "wikitext2": text.wikitext2,
    "translation-permuted": translation.TABLES["permuted"],
    "translation-mixed": translation.TABLES["mixed"],
    "translation-all": translation.TABLES["all"],
}


def render(text: str) -> str:
    """`text` with every table in it made anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(
        r"(<!-- table: ([\w-]+) -->)\n.*?(<!-- end of table -->)", table, text, flags=re.DOTALL
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        rendered = render(text)
        if not _CHECK.value:
            page.write_text(rendered, encoding="utf-8")
        elif rendered != text:
            raise SystemExit(
                f"{page.relative_to(ROOT)} differs from the results: run python "
                "benchmarks/tables.py."
            )


if __name__ == "__main__":
    app.run(main)
