"""Tables 1 to 3 of the dual autoencoder's paper, ours beside the paper's figures.

    python benchmarks/reproduce/dual_ae_tables.py --loco mvtec_loco --teacher teacher.pth --out dual-ae-tables

Image AUROC, %, of logical and of structural anomalies. Ours is the preset "paper" (70,000 steps a fit) unless
--preset says otherwise, at the last step. Categories and kinds of anomalies that are missing are named or
shown as a hyphen.

Liang and Chen, Spatial-channel dual autoencoder for industrial anomaly detection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paper_tables import Figures, Fit, PaperTable, Row, chosen, given, parser, show

LOCO = ("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors")
COLUMNS = ("logical", "structural")

# Table 1: logical and structural by category, in the order of LOCO; and the means as printed, also where its
# figures by category have other ones (SPADE 71.0 and 66.9, STPM 66.4 and 83.4).
TABLE_1: dict[str, tuple[str, Figures]] = {
    "SPADE": ("81.8 74.7 91.9 84.9 60.5 58.1 46.8 59.8 73.8 57.1", (69.0, 78.9)),
    "STPM": ("68.9 68.4 82.9 74.7 59.5 90.3 55.5 87.0 65.4 96.8", (66.4, 88.3)),
    "GCAD": ("87.0 80.9 100 98.9 97.5 74.9 56.0 70.5 89.7 78.3", (86.0, 80.7)),
    "SINBAD": ("96.5 87.5 96.6 93.1 83.4 74.2 78.6 92.2 89.3 76.7", (88.9, 84.7)),
    "RD": ("66.7 60.3 93.6 95.2 63.6 84.8 54.1 89.2 75.3 95.9", (70.7, 85.1)),
    "DADF": ("75.8 74.8 98.7 98.4 76.7 85.3 66.2 88.4 78.6 94.2", (79.2, 88.2)),
    "DSKD": ("", (81.2, 86.9)),
    "EfficientAD": ("85.0 87.3 97.5 99.8 96.7 93.8 57.8 91.1 96.7 98.3", (86.7, 94.1)),
    "dual autoencoder": ("85.5 88.6 99.6 99.8 98.7 95.6 65.9 92.4 97.4 98.2", (89.4, 94.9)),
}
# Tables 2 and 3: label, printed, the setting "additions".
TABLE_2 = (
    ("1 baseline", (86.7, 94.1), "none"),
    ("2 one autoencoder, SRM", (87.6, 94.2), "one_spatial"),
    ("3 one autoencoder, CRM", (87.8, 94.0), "one_channel"),
    ("4 two autoencoders", (87.3, 94.5), "two_plain"),
    ("5 two, SRM", (88.0, 94.5), "two_spatial"),
    ("6 two, CRM", (87.8, 94.8), "two_channel"),
    ("7 two, SRM and CRM", (88.2, 94.6), "spatial_channel"),
)
TABLE_3 = (
    ("1 baseline", (86.7, 94.1), "none"),
    ("8 cosine loss", (87.0, 94.6), "cosine"),
    ("7 two, SRM and CRM", (88.2, 94.6), "spatial_channel"),
    ("9 two, SRM and CRM, fusion", (89.2, 94.7), "spatial_channel_fusion"),
    ("10 two, SRM and CRM, cosine loss", (88.4, 94.7), "spatial_channel_cosine"),
    ("11 all", (89.4, 94.9), "all"),
)


def tables(preset: str, teacher: str | None) -> list[PaperTable]:
    """All three, our rows with a preset and a teacher."""
    settings = {} if teacher is None else {"teacher": teacher}

    def row(label: str, printed: Figures, additions: str) -> Row:
        return Row(label, printed, Fit("dual_ae", preset, {**settings, "additions": additions}))

    fits = {
        "SPADE": Fit("spade", backbone="wide_resnet50_2"),
        "EfficientAD": Fit("efficientad", preset, settings),
        "dual autoencoder": Fit("dual_ae", preset, settings),
    }
    first = tuple(
        Row(label, printed, fits.get(label), by_category(figures))
        for label, (figures, printed) in TABLE_1.items()
    )
    return [
        PaperTable("1", "MVTec LOCO AD", COLUMNS, first, LOCO, "loco"),
        PaperTable("2", "reunion modules", COLUMNS, tuple(row(*one) for one in TABLE_2), LOCO, "loco"),
        PaperTable("3", "fusion and cosine loss", COLUMNS, tuple(row(*one) for one in TABLE_3), LOCO, "loco"),
    ]


def by_category(figures: str) -> dict[str, Figures]:
    """A line of table 1 by category."""
    values = list(map(float, figures.split()))
    return {name: tuple(values[2 * at : 2 * at + 2]) for at, name in enumerate(LOCO)} if values else {}


def by_kind(row: Mapping[str, Any]) -> Figures:
    """Image AUROC of logical and of structural anomalies, %; None for a kind that the test set lacks."""
    kinds = row["metrics"]["image_auroc_by_defect"]
    figures = (kinds.get(f"{kind}_anomalies") for kind in COLUMNS)
    return tuple(None if figure is None else 100 * figure for figure in figures)


def main() -> None:
    """Read the command line, fit, print."""
    assert __doc__ is not None
    arguments = parser(__doc__, {"loco": "MVTec LOCO AD, or some of its categories"})
    arguments.add_argument(
        "--teacher", help="the setting teacher: a name, or a file  [default: the preset's]"
    )
    arguments.add_argument(
        "--resnet18", metavar="WEIGHTS", help="for --teacher resnet18: imagenet, or a file"
    )
    arguments.add_argument("--wide-resnet50", metavar="WEIGHTS", help="for SPADE: imagenet, or a file")
    arguments.add_argument("--preset", default="paper", help="of the dual autoencoder: paper or default")
    options = arguments.parse_args()
    show(
        chosen(tables(options.preset, options.teacher), options.tables),
        given(options, ["loco"], {"resnet18": options.resnet18, "wide_resnet50_2": options.wide_resnet50}),
        by_kind,
    )


if __name__ == "__main__":
    main()
