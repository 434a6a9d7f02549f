"""The folder of scores: what is in it, what stays, and what can never be written outside of it."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pydefect import score_folder
from pydefect.data.images import SkippedImage
from pydefect.errors import InputError
from pydefect.score_folder import ScoreFolderWriter, check_inputs, write_score_folder
from pydefect.scoring import Result
from pydefect.visualization import overlay

SIZE = (40, 60)
THRESHOLD = 1.0


def make_result(
    names: list[str],
    scores: list[float] | None = None,
    *,
    paths: list[Path | None] | None = None,
    threshold: float | None = THRESHOLD,
    box: tuple[int, int, int, int] = (0, 0, *SIZE),
    skipped: list[SkippedImage] | None = None,
) -> Result:
    scores = scores or [2.0 + index for index in range(len(names))]
    maps = []
    for score in scores:
        anomaly_map = np.zeros(SIZE, np.float32)
        anomaly_map[10:20, 30:45] = score / 2
        anomaly_map[12, 33] = score
        maps.append(anomaly_map)
    return Result(
        image_scores=np.array(scores, np.float32),
        anomaly_maps=maps,
        paths=paths or [None] * len(names),
        names=names,
        scored_boxes=[box] * len(names),
        image_threshold=threshold,
        pixel_threshold=threshold,
        skipped=skipped or [],
    )


def images_for(count: int) -> list[np.ndarray]:
    return [np.full((*SIZE, 3), 50 + index, np.uint8) for index in range(count)]


def read_rows(out: Path) -> list[dict[str, str]]:
    with (out / "scores.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_picture(path: Path) -> np.ndarray:
    picture = cv2.imread(os.fspath(path), cv2.IMREAD_UNCHANGED)
    assert picture is not None, path
    return picture if picture.ndim == 2 else picture[..., ::-1]


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_scores_are_the_results_own(tmp_path: Path) -> None:
    result = make_result(["a.png", "sub/b.jpg"], [0.1, 2.5], skipped=[SkippedImage("c.png", "empty file")])
    out = write_score_folder(
        result, tmp_path / "new" / "scores", images=images_for(2), configuration={"gamma": 4}
    )
    first, second = read_rows(out)
    assert [first["name"], first["defective"], first["path"]] == ["a.png", "false", ""]
    assert [second["defective"], second["picture"]] == ["true", "sub/b.jpg.png"]
    assert (second["peak_row"], second["peak_column"]) == ("12", "33")
    assert np.float32(first["score"]) == result.image_scores[0]
    content = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert content["image_threshold"] == content["pixel_threshold"] == THRESHOLD
    assert content["configuration"] == {"gamma": 4}
    assert content["skipped"] == [{"name": "c.png", "path": None, "reason": "empty file"}]
    assert [row["score"] for row in content["images"]] == [float(first["score"]), float(second["score"])]


def test_defective_regions_are_listed(tmp_path: Path) -> None:
    result = make_result(["two.png", "none.png"], [4.0, 0.5])
    result.anomaly_maps[0][30:32, 5:8] = 1.5
    result.anomaly_maps[0][31, 6] = np.float32(1.7)
    write_score_folder(result, tmp_path, pictures="none")
    header = (tmp_path / "scores.csv").read_text().splitlines()[0]
    assert header.endswith(",peak_row,peak_column,picture,regions")
    assert [row["regions"] for row in read_rows(tmp_path)] == ["2", "0"]

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    two, none = json.loads((tmp_path / "scores.json").read_text(), parse_constant=refuse)["images"]
    assert none["regions"] == []
    assert two["regions"] == [
        {
            "top": 10,
            "left": 30,
            "bottom": 20,
            "right": 45,
            "area": 150,
            "centroid_row": 15.0,
            "centroid_column": 37.5,
            "peak_row": two["peak_row"],
            "peak_column": two["peak_column"],
            "score": 4.0,
        },
        {
            "top": 30,
            "left": 5,
            "bottom": 32,
            "right": 8,
            "area": 6,
            "centroid_row": 31.0,
            "centroid_column": 6.5,
            "peak_row": 31,
            "peak_column": 6,
            "score": float(np.float32(1.7)),
        },
    ]


def test_pictures_show_the_image_the_map_and_the_mask(tmp_path: Path) -> None:
    result = make_result(["a.png"], [3.0])
    write_score_folder(result, tmp_path, images=images_for(1), maps=True)
    mask = result.masks[0] if result.masks else None
    assert mask is not None
    assert np.array_equal(read_picture(tmp_path / "masks/a.png"), mask * np.uint8(255))
    expected = overlay(images_for(1)[0], result.anomaly_maps[0], 0.5 * THRESHOLD, 1.5 * THRESHOLD)
    assert np.array_equal(read_picture(tmp_path / "overlays/a.png"), expected)
    contours = read_picture(tmp_path / "contours/a.png")
    assert tuple(contours[10, 37]) == (255, 0, 0)
    assert tuple(contours[30, 10]) == (50, 50, 50)
    assert np.array_equal(read_picture(tmp_path / "maps/a.tiff"), result.anomaly_maps[0])
    assert (tmp_path / "sheet.png").is_file()


def test_what_was_not_scored_is_faded(tmp_path: Path) -> None:
    result = make_result(["a.png"], box=(5, 5, 35, 55))
    write_score_folder(result, tmp_path, images=images_for(1))
    for folder in ("overlays", "contours"):
        picture = read_picture(tmp_path / folder / "a.png")
        assert tuple(picture[2, 2]) == (102, 102, 102)
        assert tuple(picture[30, 10]) == (50, 50, 50)


@pytest.mark.parametrize("threshold", [THRESHOLD, None])
def test_what_was_ignored_is_faded(tmp_path: Path, threshold: float | None) -> None:
    """At once, and where the pictures wait for their colours."""
    ignored = np.zeros(SIZE, bool)
    ignored[2:9, 3:12] = True
    plain = make_result(["a.png", "b.png"], threshold=threshold)
    result = replace(plain, ignored=[None, ignored])
    write_score_folder(result, tmp_path / "some", images=images_for(2))
    with ScoreFolderWriter(tmp_path / "parts") as writer:
        writer.add(result, images=images_for(2))
    for folder in ("overlays", "contours") if threshold else ("overlays",):
        for out in (tmp_path / "some", tmp_path / "parts"):
            first, second = (read_picture(out / folder / name) for name in ("a.png", "b.png"))
            assert tuple(first[2, 3]) == (50, 50, 50)
            assert (second[ignored] == 102).all()
            assert tuple(second[1, 3]) == (51, 51, 51)
    write_score_folder(plain, tmp_path / "plain", images=images_for(2))
    assert (read_picture(tmp_path / "some/sheet.png") != read_picture(tmp_path / "plain/sheet.png")).any()


def test_without_a_threshold_the_colours_leave_out_what_was_ignored(tmp_path: Path) -> None:
    ignored = np.ones(SIZE, bool)
    ignored[:8, :8] = False
    anomaly_map = np.where(ignored, 0, 3).astype(np.float32)
    anomaly_map[1, 1] = 9
    result = replace(make_result(["a.png"], threshold=None), anomaly_maps=[anomaly_map], ignored=[ignored])
    write_score_folder(result, tmp_path / "some", images=images_for(1))
    with ScoreFolderWriter(tmp_path / "parts") as writer:
        writer.add(result, images=images_for(1))
    for out in ("some", "parts"):
        assert json.loads((tmp_path / out / "scores.json").read_text())["heat_map_scale"] == [3, 9]


def test_without_a_threshold_there_are_neither_masks_nor_verdicts(tmp_path: Path) -> None:
    write_score_folder(make_result(["a.png"], threshold=None), tmp_path, images=images_for(1))
    assert files_below(tmp_path) == {"scores.csv", "scores.json", "sheet.png", "overlays/a.png"}
    assert read_rows(tmp_path)[0]["defective"] == ""
    (row,) = json.loads((tmp_path / "scores.json").read_text())["images"]
    assert row["defective"] is row["regions"] is None
    assert read_rows(tmp_path)[0]["regions"] == ""


def test_scores_only(tmp_path: Path) -> None:
    write_score_folder(make_result(["a.png", "b.png"]), tmp_path, pictures="none")
    assert files_below(tmp_path) == {"scores.csv", "scores.json"}


@pytest.mark.parametrize("pixel_threshold", [THRESHOLD, None])
def test_pictures_of_defective_images_only(tmp_path: Path, pixel_threshold: float | None) -> None:
    """And the sheet as before: the highest scores, in the colours of all."""
    names, scores = ["good.png", "bad.png", "worse.png", "best.png"], [0.9, 1.5, 3.0, 0.2]
    result = replace(make_result(names, scores), pixel_threshold=pixel_threshold)
    drawn, count = ["", "bad.png", "worse.png", ""], len(names)
    write_score_folder(result, tmp_path / "all", images=images_for(count), sheet_images=3)
    write_score_folder(
        result, tmp_path / "some", images=images_for(count), sheet_images=3, pictures="defective", maps=True
    )
    with ScoreFolderWriter(tmp_path / "parts", sheet_images=3, pictures="defective", maps=True) as writer:
        for index in range(count):
            part = make_result(names[index : index + 1], scores[index : index + 1])
            part = replace(part, pixel_threshold=pixel_threshold)
            writer.add(part, images=images_for(count)[index : index + 1])
    for some in (tmp_path / "some", tmp_path / "parts"):
        assert [row["picture"] for row in read_rows(some)] == drawn
        content = json.loads((some / "scores.json").read_text())
        assert [row["picture"] for row in content["images"]] == [name or None for name in drawn]
        below = files_below(some)
        kinds = ("overlays", "contours", "masks") if pixel_threshold else ("overlays",)
        pictures = {f"{kind}/{name}" for kind in kinds for name in drawn if name}
        assert below == pictures | {"scores.csv", "scores.json", "sheet.png"} | {
            f"maps/{name[:-4]}.tiff" for name in names
        }
        for name in [*pictures, "sheet.png"]:
            assert (some / name).read_bytes() == (tmp_path / "all" / name).read_bytes(), name


def test_a_sheet_without_any_defective_image(tmp_path: Path) -> None:
    result = replace(make_result(["a", "b"], [0.1, 0.2]), pixel_threshold=None)
    with ScoreFolderWriter(tmp_path, pictures="defective") as writer:
        writer.add(result, images=images_for(2))
    assert files_below(tmp_path) == {"scores.csv", "scores.json", "sheet.png"}


def test_files_of_good_images_are_not_read_again(tmp_path: Path) -> None:
    paths: list[Path | None] = [tmp_path / f"{index}.png" for index in range(3)]
    cv2.imwrite(os.fspath(paths[1]), images_for(1)[0])  # the others are gone
    result = make_result(["0", "1", "2"], [0.5, 2.0, 0.7], paths=paths)
    write_score_folder(result, tmp_path / "out", pictures="defective", sheet_images=0)
    assert [row["picture"] for row in read_rows(tmp_path / "out")] == ["", "1.png", ""]
    with pytest.raises(InputError, match=r"0\.png: cannot be read"):
        write_score_folder(result, tmp_path / "out", pictures="defective")


@pytest.mark.parametrize("pictures", [True, False, "some", ["all"], None])
def test_other_pictures_are_refused(tmp_path: Path, pictures: object) -> None:
    with pytest.raises(InputError, match=r'pictures: .* given; allowed are "all", "defective" and "none"'):
        write_score_folder(make_result(["a.png"]), tmp_path / "out", pictures=pictures)
    assert not (tmp_path / "out").exists()


def test_without_thresholds_no_image_is_called_defective(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = make_result(["a.png"], threshold=None)
    message = 'pictures: "defective" given, but without thresholds'
    with pytest.raises(InputError, match=message):
        write_score_folder(result, out, images=images_for(1), pictures="defective")
    with pytest.raises(InputError, match=message):
        ScoreFolderWriter(out, pictures="defective", thresholds=(None, None))
    assert not out.exists()

    def add() -> None:
        with ScoreFolderWriter(out, pictures="defective", maps=True) as writer:
            writer.add(result, images=images_for(1))

    with pytest.raises(InputError, match=message):
        add()
    assert files_below(out) == set()


def test_an_empty_result_is_a_folder_too(tmp_path: Path) -> None:
    result = make_result([], [])
    # Of a method whose maps have parts: there are no scores of these either.
    for empty in (result, replace(result, part_thresholds={"local": 1.0, "global": 1.0})):
        write_score_folder(empty, tmp_path)
        assert read_rows(tmp_path) == []


def test_what_a_killed_program_put_aside_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".unfinished-k1l2ed_0"
    left.mkdir()
    # Nobody holds this lock.
    (left / "pydefect.lock").touch()
    write_score_folder(make_result(["a"], threshold=None), tmp_path, images=images_for(1))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("threshold", [THRESHOLD, None])
def test_parts_give_the_same_folder_as_the_whole(tmp_path: Path, threshold: float | None) -> None:
    names = ["a.png", "b/c.png", "d.jpg"]
    write_score_folder(
        make_result(names, threshold=threshold), tmp_path / "whole", images=images_for(3), maps=True
    )
    with ScoreFolderWriter(tmp_path / "parts", maps=True) as writer:
        for index, name in enumerate(names):
            part = make_result([name], [2.0 + index], threshold=threshold)
            writer.add(part, images=images_for(3)[index : index + 1])
    assert files_below(tmp_path / "parts") == files_below(tmp_path / "whole")
    for name in files_below(tmp_path / "whole"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("threshold", [THRESHOLD, None])
def test_a_failure_leaves_no_list_that_looks_complete(tmp_path: Path, threshold: float | None) -> None:
    def fail_half_way() -> None:
        with ScoreFolderWriter(tmp_path) as writer:
            writer.add(make_result(["a.png"], threshold=threshold), images=images_for(1))
            raise RuntimeError("the next image is damaged")

    with pytest.raises(RuntimeError, match="damaged"):
        fail_half_way()
    assert not files_below(tmp_path) & {"scores.csv", "scores.json", "sheet.png"}
    assert not [name for name in files_below(tmp_path) if name.startswith(".")]


HOSTILE = [
    "../../escape.png",
    "/etc/escape.png",
    "..\\..\\escape.png",
    "C:\\escape.png",
    "a/../../escape.png",
    "..",
    "a.png",
    "a.jpg",
    "A.PNG",
    "a",
    "a.png/b.png",
    "a.jpg.png",
    "line\nbreak.png",
    "x" * 255 + ".png",
    "é" * 120 + ".png",
]


def test_no_name_leads_out_of_the_folder_or_onto_another(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "scores"
    count = len(HOSTILE)
    write_score_folder(make_result(HOSTILE), out, images=images_for(count), maps=True, sheet_images=count)
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in out.parent.iterdir()} == {"scores"}
    pictures = [row["picture"] for row in read_rows(out)]
    assert len({picture.casefold() for picture in pictures}) == count
    assert all((out / "overlays" / picture).is_file() for picture in pictures)
    assert [row["name"] for row in read_rows(out)] == HOSTILE
    # Each picture is of its own image: none was overwritten by another.
    for index, picture in enumerate(pictures):
        assert tuple(read_picture(out / "overlays" / picture)[30, 10]) == (50 + index,) * 3


def test_files_of_others_stay_and_own_ones_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep")
    write_score_folder(make_result(["a.png", "b.png"]), tmp_path, images=images_for(2))
    before = (tmp_path / "overlays/a.png").read_bytes()
    write_score_folder(make_result(["a.png"], [1.5]), tmp_path, images=images_for(1))
    assert (tmp_path / "notes.txt").read_text() == "keep"
    assert (tmp_path / "overlays/b.png").is_file()
    assert (tmp_path / "overlays/a.png").read_bytes() != before
    assert [row["name"] for row in read_rows(tmp_path)] == ["a.png"]


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in files_below(out)}


def append(out: Path, names: list[str], *, first: int = 0, **settings: object) -> None:
    """Add images; the grey of each is its number, from the first on."""
    paths = settings.pop("paths", None)
    result = make_result(names, [2.0 + first + index for index in range(len(names))], paths=paths)
    images = images_for(first + len(names))[first:]
    write_score_folder(result, out, images=images, append=True, **settings)


def test_appending_gives_the_folder_of_one_call(tmp_path: Path) -> None:
    """Names that would be one file name stay apart, across calls too."""
    count = len(HOSTILE)
    scores = [2.0 + index for index in range(count)]
    write_score_folder(make_result(HOSTILE, scores), tmp_path / "one", images=images_for(count), maps=True)
    for first, last in ((0, 4), (4, 9), (9, count)):
        append(tmp_path / "calls", HOSTILE[first:last], first=first, maps=True)
    one, calls = contents(tmp_path / "one"), contents(tmp_path / "calls")
    assert one.keys() == calls.keys()
    assert {name for name in one if one[name] != calls[name]} == {"sheet.png"}


def test_the_sheet_shows_the_latest_images(tmp_path: Path) -> None:
    append(tmp_path, ["a.png", "b.png"])
    append(tmp_path, ["c.png"], first=2)
    write_score_folder(make_result(["c.png"], [4.0]), tmp_path / "other", images=images_for(3)[2:])
    sheet = (tmp_path / "sheet.png").read_bytes()
    assert sheet == (tmp_path / "other/sheet.png").read_bytes()
    before = contents(tmp_path)
    with ScoreFolderWriter(tmp_path, append=True):
        pass
    assert contents(tmp_path) == before


def test_pictures_may_be_others_in_every_call(tmp_path: Path) -> None:
    append(tmp_path, ["a.png"], pictures="none")
    append(tmp_path, ["A.png", "b.png"], first=1, pictures="defective")
    assert [row["picture"] for row in read_rows(tmp_path)] == ["", "A-2.png", "b.png"]
    assert files_below(tmp_path / "masks") == {"A-2.png", "b.png"}


def test_pictures_without_a_threshold_keep_the_colours_of_the_first(tmp_path: Path) -> None:
    for index, name in enumerate(["a.png", "b.png"]):
        result = make_result([name], [2.0 + 7 * index], threshold=None)
        write_score_folder(result, tmp_path, images=images_for(2)[index:][:1], append=True)
        scale = json.loads((tmp_path / "scores.json").read_text())["heat_map_scale"]
        assert scale == [0, 2]
        expected = overlay(images_for(2)[index], result.anomaly_maps[0], *scale)
        assert np.array_equal(read_picture(tmp_path / "overlays" / name), expected)


def test_an_image_that_is_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    append(out, ["1.png", "part-1"], paths=[Path("day-1/1.png"), None])
    before = contents(out)
    for names, paths, named in (
        (["new.png", "1.png"], [Path("new.png"), tmp_path / "day-1" / "1.png"], "day-1/1.png"),
        (["another-name"], [Path("day-2/../day-1/1.png")], "1.png"),
        (["new", "part-1"], [None, None], "part-1"),
    ):
        with pytest.raises(InputError, match=f"append: .*{named} is in .*scores.json already; leave out"):
            append(out, names, paths=paths)
        assert contents(out) == before
    # The same name, but another file.
    append(out, ["1.png"], first=2, paths=[Path("day-2/1.png")])
    rows = read_rows(out)
    assert [row["picture"] for row in rows] == ["1.png", "part-1.png", "1-2.png"]
    assert [row["path"] for row in rows] == [
        os.path.abspath("day-1/1.png"),
        "",
        os.path.abspath("day-2/1.png"),
    ]
    assert tuple(read_picture(out / "overlays/1.png")[30, 10]) == (50,) * 3
    with ScoreFolderWriter(out, append=True) as writer:
        assert [row["name"] for row in writer.rows] == ["1.png", "part-1", "1.png"]
        assert writer.is_listed("any", "day-2/1.png")
        assert writer.is_listed("part-1")
        assert not writer.is_listed("1.png")
        assert not writer.is_listed("part-1", "day-1/part-1")


def test_names_that_are_all_equal_are_numbered_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def folders_of(key: str) -> list[str]:
        tried.append(key)
        return []

    monkeypatch.setattr(score_folder, "_folders_of", folders_of)
    names = score_folder._PictureNames()
    assert [names.take("top.png") for _ in range(200)] == ["top.png"] + [
        f"top-{n}.png" for n in range(2, 201)
    ]
    assert len(tried) < 1000


def test_only_scores_of_the_same_detector_are_added(tmp_path: Path) -> None:
    settings = {"method": "padim", "levels": (1, 2), "seed": 0}
    append(tmp_path, ["a.png"], configuration=settings)
    before = contents(tmp_path)
    for other, differing in (
        ({**settings, "seed": 1}, "seed"),
        ({"method": "spade", "levels": [1], "seed": 0}, "levels, method"),
        ({**settings, "crop": 8}, "crop"),
        (None, "configuration"),
    ):
        with pytest.raises(
            InputError, match=rf"another detector \(it differs in {differing}\); name another"
        ):
            append(tmp_path, ["b.png"], configuration=other)
    result = make_result(["b.png"], threshold=2.0)
    for thresholds, image in ((2.0, True), (None, True), (2.0, False)):
        result = replace(
            result, image_threshold=thresholds if image else THRESHOLD, pixel_threshold=thresholds
        )
        differing = "image_threshold, pixel_threshold" if image else "pixel_threshold"
        with pytest.raises(InputError, match=rf"\(it differs in {differing}\)"):
            write_score_folder(result, tmp_path, images=images_for(1), configuration=settings, append=True)

    def add_later() -> None:
        with ScoreFolderWriter(tmp_path, configuration=settings, append=True) as writer:
            writer.add(result, images=images_for(1))

    with pytest.raises(InputError, match="one pair of thresholds"):
        add_later()
    assert contents(tmp_path) == before
    append(tmp_path, ["b.png"], configuration={**settings, "levels": [1, 2]})
    assert len(read_rows(tmp_path)) == 2


def test_a_list_of_no_images_is_of_any_detector(tmp_path: Path) -> None:
    """A camera that has seen no part yet."""
    for threshold in (None, 3.0):
        write_score_folder(make_result([], [], threshold=threshold), tmp_path, append=True)
    append(tmp_path, ["a.png"], configuration={"seed": 1})
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["configuration"] == {"seed": 1}
    assert content["heat_map_scale"] == [0.5 * THRESHOLD, 1.5 * THRESHOLD]


def test_a_call_that_fails_leaves_the_lists_as_they_were(tmp_path: Path) -> None:
    append(tmp_path, ["a.png"])
    before = contents(tmp_path)

    def fail_half_way() -> None:
        with ScoreFolderWriter(tmp_path, append=True) as writer:
            writer.add(make_result(["b.png", "A.png"]), images=images_for(2))
            raise RuntimeError("the camera is gone")

    with pytest.raises(RuntimeError, match="camera"):
        fail_half_way()
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {"overlays/b.png", "overlays/A-2.png"} <= after.keys() - before.keys()


def test_a_call_that_is_killed_between_the_lists_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    append(tmp_path, ["a.png"])
    write = score_folder.write_atomically

    def write_until_the_table(path: Path, content: bytes, **how: bool) -> None:
        if path.name == "scores.csv":
            raise KeyboardInterrupt
        write(path, content, **how)

    with monkeypatch.context() as patch:
        patch.setattr(score_folder, "write_atomically", write_until_the_table)
        with pytest.raises(KeyboardInterrupt):
            append(tmp_path, ["b.png"], first=1)
    assert [row["name"] for row in read_rows(tmp_path)] == ["a.png"]
    # The next call finds the image listed, and completes the table.
    with ScoreFolderWriter(tmp_path, append=True) as writer:
        assert writer.is_listed("b.png")
    assert [row["name"] for row in read_rows(tmp_path)] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"images": [{"score": 1}]}', '{"images": [7], "skipped": []}', "\udcff"]
)
def test_what_is_no_list_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    (tmp_path / "scores.json").write_text(content, errors="surrogateescape")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"append: .*scores\.json is no list of scores to go on from"):
        append(tmp_path, ["a.png"])
    assert contents(tmp_path) == before


def test_a_table_alone_is_not_replaced(tmp_path: Path) -> None:
    append(tmp_path, ["a.png"])
    (tmp_path / "scores.json").unlink()
    with pytest.raises(
        InputError, match=r"append: .* holds a scores\.csv, but no scores\.json to go on from"
    ):
        append(tmp_path, ["b.png"])
    assert len(read_rows(tmp_path)) == 1


def test_lists_of_earlier_versions_can_be_added_to(tmp_path: Path) -> None:
    append(tmp_path, ["a.png"])
    content = json.loads((tmp_path / "scores.json").read_text())
    for column in ("regions", "p_value"):
        del content["images"][0][column]
    content["skipped"] = [{"name": "c.png", "reason": "empty"}]
    (tmp_path / "scores.json").write_text(json.dumps(content))
    append(tmp_path, ["b.png"])
    assert [row["regions"] for row in read_rows(tmp_path)] == ["", "1"]
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["skipped"] == [{"path": None, "name": "c.png", "reason": "empty"}]


def test_one_program_at_a_time_adds_to_a_folder(tmp_path: Path) -> None:
    """The last to end would drop what the others have added."""
    with ScoreFolderWriter(tmp_path, append=True) as writer:
        with pytest.raises(InputError, match="append: another program is at work in"):
            append(tmp_path, ["b.png"])
        writer.add(make_result(["a.png"]), images=images_for(1))
    append(tmp_path, ["b.png"])
    assert [row["name"] for row in read_rows(tmp_path)] == ["a.png", "b.png"]


def test_a_file_that_was_not_whole_yet_is_skipped_no_more(tmp_path: Path) -> None:
    def skipped() -> list[tuple[str, str | None]]:
        content = json.loads((tmp_path / "scores.json").read_text())
        return [(one["path"], one["reason"]) for one in content["skipped"]]

    day_1, day_2 = Path("day-1/1.png"), Path("day-2/1.png")
    listed_1, listed_2 = map(os.path.abspath, (day_1, day_2))
    for reason, path in (("cut off", day_1), ("cut off", day_2), ("still cut off", day_2)):
        with ScoreFolderWriter(tmp_path, append=True) as writer:
            writer.add_skipped([SkippedImage("1.png", reason, path)])
    assert skipped() == [(listed_1, "cut off"), (listed_2, "still cut off")]
    append(tmp_path, ["1.png"], paths=[day_2])
    assert skipped() == [(listed_1, "cut off")]


def test_a_relative_path_is_another_file_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shift"
    for line in ("line-1", "line-2"):
        (tmp_path / line).mkdir()
        monkeypatch.chdir(tmp_path / line)
        append(out, ["part.png"], paths=[Path("today/part.png")])
    monkeypatch.chdir(tmp_path)
    with ScoreFolderWriter(out, append=True) as writer:
        assert writer.is_listed("part.png", "line-1/today/part.png")
        assert not writer.is_listed("part.png", "today/part.png")
    expected = [str(tmp_path / line / "today" / "part.png") for line in ("line-1", "line-2")]
    assert [row["path"] for row in read_rows(out)] == expected


@pytest.mark.parametrize("names", [["a.tiff/b.png", "a.png"], ["a.png", "a.tiff/b.png"]])
def test_the_map_of_one_image_is_not_in_the_way_of_another(tmp_path: Path, names: list[str]) -> None:
    write_score_folder(make_result(names), tmp_path, images=images_for(2), maps=True)
    rows = read_rows(tmp_path)
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert (tmp_path / "maps" / f"{row['picture'].removesuffix('.png')}.tiff").is_file()


def test_images_are_read_again_from_their_files(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    cv2.imwrite(os.fspath(path), images_for(1)[0])
    write_score_folder(make_result(["photo.png"], paths=[path]), tmp_path / "out")
    assert tuple(read_picture(tmp_path / "out/contours/photo.png")[30, 10]) == (50, 50, 50)
    assert read_rows(tmp_path / "out")[0]["path"] == str(path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "images="),
        (images_for(1), "fewer"),
        (images_for(3), "more"),
        ([np.zeros((8, 8), np.uint8)] * 2, r"\[8, 8\]"),
    ],
)
def test_images_that_are_not_the_results_are_refused(
    tmp_path: Path, images: list[np.ndarray] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_score_folder(make_result(["a.png", "b.png"]), tmp_path, images=images)


def test_images_that_could_not_be_scored_are_passed_over(tmp_path: Path) -> None:
    # Their pixels can be read: the crop was larger than they are.
    images = images_for(3)
    images.insert(1, np.zeros((8, 8, 3), np.uint8))
    names = ["image-00000", "image-00002", "image-00003"]
    result = make_result(names, skipped=[SkippedImage("image-00001", "smaller than the crop")])
    write_score_folder(result, tmp_path, images=images)
    pictures = [read_picture(tmp_path / "contours" / f"{name}.png") for name in names]
    assert [int(picture[30, 10, 0]) for picture in pictures] == [50, 51, 52]


def test_one_folder_has_one_pair_of_thresholds(tmp_path: Path) -> None:
    def mix() -> None:
        with ScoreFolderWriter(tmp_path) as writer:
            writer.add(make_result(["a.png"]), images=images_for(1))
            writer.add(make_result(["b.png"], threshold=2.0), images=images_for(1))

    with pytest.raises(InputError, match="thresholds"):
        mix()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        write_score_folder(make_result(["a.png"]), tmp_path / "out", images=images_for(1))


def test_a_folder_without_permission_is_refused_before_any_image_is_scored(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="out: no permission to write to"):
        ScoreFolderWriter(tmp_path / "out")


def test_the_sheet_shows_the_highest_scores_first(tmp_path: Path) -> None:
    scores = [1.5, 5.0, 3.0, 4.0]
    write_score_folder(
        make_result(["a", "b", "c", "d"], scores), tmp_path, images=images_for(4), sheet_images=2
    )
    sheet = read_picture(tmp_path / "sheet.png")
    columns = {value: np.nonzero(np.all(sheet == value, axis=2).any(axis=0))[0] for value in (51, 53)}
    assert columns[51].mean() < columns[53].mean()
    assert not np.any(np.all(sheet == 50, axis=2).sum(axis=0) > 20)


def test_large_images_reach_the_sheet_with_their_small_defects(tmp_path: Path) -> None:
    anomaly_map = np.zeros((1500, 2600), np.float32)
    anomaly_map[700, 900] = 9
    result = Result(
        np.array([9.0], np.float32),
        [anomaly_map],
        [None],
        ["big"],
        [(0, 0, 1500, 2600)],
        THRESHOLD,
        THRESHOLD,
    )
    truth = anomaly_map > 0
    image = np.full((1500, 2600), 80, np.uint8)
    write_score_folder(result, tmp_path, images=[image], ground_truth=[truth])
    sheet = read_picture(tmp_path / "sheet.png").astype(int)
    redness = sheet[..., 0] - sheet[..., 1]
    assert redness.max() > 100


@pytest.mark.parametrize("threshold", [THRESHOLD, None])
def test_parts_of_the_map_and_the_kind_of_defect_are_shown(tmp_path: Path, threshold: float | None) -> None:
    result = make_result(["a", "b"], [2.0, 3.0], threshold=threshold)
    result = replace(
        result,
        part_maps={"local": result.anomaly_maps, "global": [0 * one for one in result.anomaly_maps]},
        part_scores={"local": np.array([2.0, 3.0]), "global": np.array([0.1, 0.1])},
        part_thresholds={} if threshold is None else {"local": 1.0, "global": 1.0},
    )
    write_score_folder(result, tmp_path, images=images_for(2))
    height, width = SIZE
    for name, image in zip(("a", "b"), images_for(2), strict=True):
        parts = read_picture(tmp_path / "parts" / f"{name}.png")
        assert parts.shape == (height, 3 * width, 3)
        assert (parts[:, :width, 0] == np.asarray(image).reshape(height, width, -1)[..., 0]).all()
        assert (parts[:, width : 2 * width] != parts[:, :width]).any()
        np.testing.assert_array_equal(parts[:, 2 * width :], parts[:, :width])
    assert [row["kind"] for row in read_rows(tmp_path)] == ["structural" if threshold else ""] * 2


def test_only_the_lists_wait_for_the_disk(tmp_path, monkeypatch):
    """Of many small images that took most of the time."""
    waits = []
    monkeypatch.setattr(os, "fsync", waits.append)
    write_score_folder(make_result(["a.png", "b.png"]), tmp_path, images=images_for(2), maps=True)
    assert len(waits) == 2


@pytest.mark.parametrize("place", ["", "test", "masks/deep"])
def test_scores_are_not_written_round_the_images(tmp_path, place):
    """There pictures would replace images and ground truth, and masks pass for ground truth."""
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    photograph, link = folder / "a.png", folder / "link.png"
    cv2.imwrite(str(photograph), np.zeros((8, 9, 3), np.uint8))
    elsewhere = tmp_path.with_name(tmp_path.name + "-elsewhere.png")
    link.symlink_to(elsewhere)
    for images in ([photograph], [folder], [link]):
        with pytest.raises(InputError, match=r"out: .* holds the images at"):
            check_inputs(tmp_path, images)
    check_inputs(tmp_path / "scores", [photograph, folder, link, elsewhere])
    with pytest.raises(InputError, match="holds the images at"):
        write_score_folder(make_result(["a.png"], paths=[photograph]), tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "link.png"]


def test_any_name_can_be_read_back(tmp_path):
    names = ["a\rb.png", "a\nb.png", "a\r\nb.png", 'a,"b.png', " a.png", "a\u2028b.png", "plain.png"]
    write_score_folder(make_result(names), tmp_path, pictures="none")
    assert [row["name"] for row in read_rows(tmp_path)] == names
    # Nothing else is quoted, and every line ends as before.
    assert (tmp_path / "scores.csv").read_bytes().endswith(b"\nplain.png,,8.0,1.0,true,,,12,33,,1\n")


@pytest.mark.parametrize("threshold", [0.1, float(np.float32(0.1)), np.nextafter(float(np.float32(0.1)), 0)])
def test_the_written_numbers_give_the_written_decision(tmp_path, threshold):
    """A float32 next to the threshold, which has more digits than it or none of its own type."""
    middle = np.float32(0.1)
    scores = [
        np.nextafter(middle, np.float32(0)),
        middle,
        np.nextafter(middle, np.float32(1)),
        np.float32(1 / 3),
    ]
    result = make_result(list("abcd"), [float(score) for score in scores], threshold=threshold)
    write_score_folder(result, tmp_path, pictures="none")
    content = json.loads((tmp_path / "scores.json").read_text())
    for row, again, score in zip(read_rows(tmp_path), content["images"], scores, strict=True):
        assert np.float32(row["score"]) == np.float32(again["score"]) == score
        assert float(row["score"]) == again["score"]
        assert float(row["image_threshold"]) == again["image_threshold"] == threshold
        assert (float(row["score"]) > float(row["image_threshold"])) == (row["defective"] == "true")
        assert (row["defective"] == "true") == again["defective"]
    assert result.is_defective.tolist() == [row["defective"] for row in content["images"]]


def test_a_given_scale_is_kept(tmp_path: Path) -> None:
    result = Result(
        image_scores=np.array([2.0], np.float32),
        anomaly_maps=[np.full((8, 8), 2, np.float32)],
        paths=[None],
        names=["a"],
        scored_boxes=[(0, 0, 8, 8)],
        image_threshold=1.0,
        pixel_threshold=1.0,
    )
    with ScoreFolderWriter(tmp_path / "out", scale=(0.0, 9.0)) as writer:
        writer.add(result, images=np.zeros((1, 8, 8, 3), np.uint8))
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["heat_map_scale"] == [0, 9]
