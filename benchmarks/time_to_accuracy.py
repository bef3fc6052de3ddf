"""Minutes, evaluations included, until a run first had the report's test accuracy, and until its end.

python -m benchmarks.time_to_accuracy                 of the runs with tables in weights/ and docs/runs/
python -m benchmarks.time_to_accuracy runs/cifar10    of your own"""

import csv
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # for `python benchmarks/time_to_accuracy.py`

from common import cli

REPORT = 0.8633  # test accuracy at 224×224
RUNS = [
    "weights",
    *(f"docs/runs/{run}" for run in "quick quick_cpu quick_zen4 averaged jitter sgd assignment".split()),
]


def minutes(rows, accuracy):
    """From the rows of a metrics.csv: minutes until the test accuracy at the last size was first at least
    `accuracy` (None if it never was), and minutes in all."""
    elapsed, reached = 0.0, None
    for row in rows:
        elapsed += float(row["seconds"]) / 60
        if reached is None and float(row["last_size_accuracy"] or 0) >= accuracy:
            reached = elapsed
    return reached, elapsed


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("runs", nargs="*", default=RUNS, metavar="DIR", help="folders with a metrics.csv")
    print(f"{'run':<24}{'epochs':>8}{f'minutes to {REPORT:.2%}':>20}{'minutes':>10}{'test accuracy':>16}")
    for run in parser.parse_args(argv).runs:
        try:
            rows = list(csv.DictReader(Path(run, "metrics.csv").read_text(encoding="utf-8").splitlines()))
            reached, elapsed = minutes(rows, REPORT)
            final = float(rows[-1]["last_size_accuracy"] or "nan")
        except (OSError, KeyError, IndexError, ValueError):
            raise cli.UserError(f"no metrics.csv of a run in {run}: name the folder of a run of train.py")
        first = "never" if reached is None else f"{reached:.1f}"
        print(f"{run:<24}{len(rows):>8}{first:>20}{elapsed:>10.1f}{final:>16.2%}")


if __name__ == "__main__":
    main()
