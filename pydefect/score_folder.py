"""A folder of scores and pictures from a :class:`~pydefect.scoring.Result`."""

from __future__ import annotations

import csv
import heapq
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from pydefect.data.images import SkippedImage, open_images, read_image
from pydefect.errors import InputError
from pydefect.persistence import alone_in, remove_left, working_folder, write_atomically
from pydefect.places import check_writable
from pydefect.scoring import Region, Result
from pydefect.shapes import Box
from pydefect.version import VERSION
from pydefect.visualization import (
    comparison_sheet,
    draw_contours,
    fade_unscored,
    map_range,
    overlay,
    scale_of_ranges,
    shared_scale,
    shrink,
    shrink_mask,
    to_rgb8,
)

__all__ = ["Pictures", "ScoreFolderWriter", "check_inputs", "write_picture", "write_score_folder"]

Pictures = Literal["all", "defective", "none"]

_COLUMNS = (
    "name",
    "path",
    "score",
    "image_threshold",
    "defective",
    "kind",
    "p_value",
    "peak_row",
    "peak_column",
    "picture",
    "regions",
)
# What scores.json says about each region.
_REGION = (
    "top",
    "left",
    "bottom",
    "right",
    "area",
    "centroid_row",
    "centroid_column",
    "peak_row",
    "peak_column",
    "score",
)
_LIST = "scores.json"
# What waits for the sheet is made no larger than this: a few large photographs would fill the memory.
_SHEET_EDGE = 1024
# What the arrays of a map's parts are called where they wait.
_PART = "part-"
# What the names of folders begin with in which images wait.
_UNFINISHED = ".unfinished-"
# In bytes, of one part of a path: most file systems allow 255, and endings come on top.
_LONGEST_NAME = 180


def write_score_folder(
    result: Result,
    out: str | os.PathLike[str],
    *,
    images: Any = None,
    ground_truth: Sequence[NDArray[Any]] | None = None,
    pictures: Pictures = "all",
    maps: bool = False,
    sheet_images: int = 8,
    configuration: Mapping[str, Any] | None = None,
    append: bool = False,
) -> Path:
    """Write scores and pictures of all images of a result into a folder.

    ::

        out/scores.csv             name, path, score, image_threshold, defective, kind, p_value,
                                   peak_row, peak_column, picture, regions
        out/scores.json            the same, with thresholds, skipped files, version and configuration
        out/overlays/<picture>     the heat map over the image
        out/contours/<picture>     a red curve round every defective region (with a pixel threshold)
        out/parts/<picture>        the image and the parts of its map side by side (of methods with parts)
        out/masks/<picture>        defective pixels 255, others 0 (with a pixel threshold)
        out/maps/<name>.tiff       the anomaly map in float32 (with maps=True)
        out/sheet.png              the images with the highest scores, side by side

    ``defective`` is true where ``score`` is greater than ``image_threshold``, as both are written.
    ``picture`` is the image's name with ``.png`` appended where it has another ending, so that ``a.png`` and
    ``a.jpg`` stay apart; subfolders stay; it is empty for an image without pictures. Parts of a name that
    lead out of the folder (``..``, a leading ``/``) are left out. (peak_row, peak_column) is the pixel with
    the highest score.

    ``regions`` is the number of defective regions, and in ``scores.json`` the list of them (with a pixel
    threshold): :attr:`pydefect.Result.regions`, as ``top``, ``left``, ``bottom``, ``right``, ``area``,
    ``centroid_row``, ``centroid_column``, ``peak_row``, ``peak_column`` and ``score``.

    Every file is complete or absent, even if the program is killed. Files of the same names are replaced, all
    others in the folder stay; ``scores.csv`` lists the pictures of the latest call and is written last.

    With ``append=True`` the lists go on from what ``scores.json`` holds, so that one folder collects a shift.
    It must be of the same detector, and no image may be in it yet: files are known by their paths, images
    without files by their names. No picture of a listed image is replaced. A call that fails or is killed
    leaves the lists as they were. ``sheet.png`` shows images of the latest call that brought any: the maps of
    earlier ones are gone.

    Parameters
    ----------
    result
        From :func:`pydefect.score`.
    out
        Folder to write to, made where it is missing.
    images
        The images that were scored, in any form of :func:`pydefect.score`, for results whose images did not
        come from files; None reads them again from the result's paths.
    ground_truth
        One mask [H, W] an image, shown on the sheet.
    pictures
        ``"all"``; ``"defective"`` draws the images that are called defective only, and still the highest
        scores of all on the sheet; ``"none"`` writes the scores only.
    maps
        Write the anomaly maps too, of all images.
    sheet_images
        Number of columns of ``sheet.png``; 0 for none.
    configuration
        JSON values to keep in ``scores.json``, such as the detector's settings.
    append
        Add to the lists that are in the folder; where there are none they begin.

    Returns
    -------
    pathlib.Path
        `out`.

    Raises
    ------
    InputError
        The folder is a file or holds the images themselves, an image cannot be had any more, `images` are
        not those of the result, or pictures of defective ones are asked for of a result without thresholds.
        With `append`: thresholds or configuration are not those of the lists, an image is in them already,
        ``scores.json`` cannot be read, or another program is adding to the folder.

    See Also
    --------
    ScoreFolderWriter : the same in parts, for more images than fit into memory.

    Examples
    --------
    >>> result = pydefect.score(detector, "bottle/test")       # doctest: +SKIP
    >>> write_score_folder(result, "bottle-scores")                  # doctest: +SKIP
    """
    scale = None
    if len(result) and pictures != "none":
        scale = shared_scale(
            result.anomaly_maps,
            pixel_threshold=result.pixel_threshold,
            scored_boxes=result.scored_boxes,
            ignored=result.ignored or None,
        )
    with ScoreFolderWriter(
        out,
        pictures=pictures,
        maps=maps,
        sheet_images=sheet_images,
        scale=scale,
        thresholds=_thresholds_of(result),
        configuration=configuration,
        append=append,
    ) as writer:
        writer.add(result, images=images, ground_truth=ground_truth)
    return writer.out


def write_picture(path: str | os.PathLike[str], picture: NDArray[np.uint8]) -> None:
    """Write an RGB or grey picture as PNG, whole or not at all; its folder is made where it is missing.

    Parameters
    ----------
    path
        The file.
    picture
        [H, W, 3] RGB or [H, W], uint8.
    """
    content = _encoded_image(".png", picture if picture.ndim == 2 else picture[..., ::-1])
    # Thousands come one after the other, and can be had again.
    write_atomically(path, content, durable=False)


def check_inputs(out: Path, images: Iterable[Path]) -> None:
    """Refuse a folder of scores that holds the images themselves.

    Its pictures could replace them or files beside them, and ``masks`` there is a data set's ground truth.

    Parameters
    ----------
    out
        The folder of scores.
    images
        Files, or folders of files.

    Raises
    ------
    InputError
        One of them lies in ``out`` or below it.
    """
    folder = out.resolve()
    for path in images:
        if any(place.is_relative_to(folder) for place in (path.resolve(), path.parent.resolve() / path.name)):
            raise InputError(
                f"out: {out} holds the images at {path}; its pictures could replace files there, or pass for "
                "ground truth: name a folder of its own"
            )


class ScoreFolderWriter:
    """Writes the folder of :func:`write_score_folder` from results that come in parts, none of which is kept.

    Use it as a context manager: the lists of scores and the sheet are written at its end, and not at all if
    an exception leaves it, since an incomplete list would pass for a complete one.

    Parameters
    ----------
    out, pictures, maps, sheet_images, configuration, append
        As for :func:`write_score_folder`.
    scale
        (low, high) of the heat maps' colours; None for :func:`~pydefect.visualization.shared_scale`. Without
        a pixel threshold that scale is known only after the last image: images and maps then wait in a
        temporary folder inside `out`, and the pictures are drawn at the end. With `append` earlier pictures
        have the scale, where there are any.
    thresholds
        (image, pixel) of the results to come, for a refusal before any work; None: those of the first result.

    Attributes
    ----------
    out : pathlib.Path
        The folder.
    rows : list of dict
        What ``scores.json`` says about each image so far; with `append` those of earlier calls come first.

    Raises
    ------
    InputError
        `out` is a file, lies below one, or may not be written to; another argument is not allowed. Where the
        ``with`` begins: see :func:`write_score_folder` for `append`.

    Examples
    --------
    >>> with ScoreFolderWriter("scores") as writer:                 # doctest: +SKIP
    ...     for paths in batches:
    ...         writer.add(pydefect.score(detector, paths))
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        pictures: Pictures = "all",
        maps: bool = False,
        sheet_images: int = 8,
        scale: tuple[float, float] | None = None,
        thresholds: tuple[float | None, float | None] | None = None,
        configuration: Mapping[str, Any] | None = None,
        append: bool = False,
    ) -> None:
        self.out = Path(out)
        check_writable(self.out, "out")
        if sheet_images < 0:
            raise InputError(f"sheet_images: {sheet_images!r} given; allowed are 0 and more")
        if pictures not in get_args(Pictures):
            raise InputError(f'pictures: {pictures!r} given; allowed are "all", "defective" and "none"')
        self.rows: list[dict[str, Any]] = []
        self._pictures: Pictures = pictures
        self._maps = maps
        self._sheet = _HighestScores(sheet_images if pictures != "none" else 0)
        self._scale = scale
        self._configuration = configuration
        self._append = append
        self._earlier: set[str] = set()
        self._earlier_skipped: list[dict[str, Any]] = []
        self._skipped: list[SkippedImage] = []
        self._thresholds: tuple[float | None, float | None] | None = None
        self._picture_names = _PictureNames()
        self._open = ExitStack()
        self._waiting: Path | None = None
        self._waiting_rows: list[dict[str, Any]] = []
        self._ranges: list[tuple[float, float]] = []
        if thresholds is not None:
            self._set_thresholds(thresholds)

    def __enter__(self) -> ScoreFolderWriter:
        self.out.mkdir(parents=True, exist_ok=True)
        remove_left(self.out, _UNFINISHED)
        if self._append:
            with ExitStack() as stack:
                stack.enter_context(alone_in(self.out, "append"))
                self._take_up()
                self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if kind is None:
                self._finish()

    def is_listed(self, name: str, path: str | os.PathLike[str] | None = None) -> bool:
        """Whether an image is in the lists of earlier calls, to which this one appends.

        Parameters
        ----------
        name, path
            Of the image: a file is known by its path alone (a relative one starts at the current folder), an
            image without a file by its name.
        """
        return _identity(name, path) in self._earlier

    def add(
        self,
        result: Result,
        *,
        images: Any = None,
        ground_truth: Sequence[NDArray[Any]] | None = None,
    ) -> None:
        """Add the images of one result; pictures are on disk when this returns.

        Parameters
        ----------
        result
            Of the same detector as all others: its thresholds must be the same.
        images, ground_truth
            As for :func:`write_score_folder`, for the images of this result.

        Raises
        ------
        InputError
            See :func:`write_score_folder`; or the thresholds differ from those of an earlier result. Of an
            image that is listed already, before anything of the result is written.
        """
        self._set_thresholds(_thresholds_of(result))
        for name, path in zip(result.names, result.paths, strict=True):
            if self.is_listed(name, path):
                raise InputError(
                    f"append: {path or name} is in {self.out / _LIST} already; leave out what is_listed() "
                    "tells, and give images without files names of their own"
                )
        check_inputs(self.out, [path for path in result.paths if path is not None])
        if ground_truth is not None and len(ground_truth) != len(result):
            raise InputError(f"ground_truth has {len(ground_truth)} entries for {len(result)} images")
        if self._scale is None and result.pixel_threshold is not None and result.pixel_threshold > 0:
            self._scale = shared_scale([], pixel_threshold=result.pixel_threshold)
        self.add_skipped(result.skipped)

        defective, threshold = result.is_defective, result.image_threshold
        kinds, regions = result.kind, result.regions
        sources = _sources_of(result, images) if self._pictures != "none" else itertools.repeat(None)
        # The sources come first: only so is it seen that there are more of them than of results.
        for source, index in zip(sources, range(len(result)), strict=False):
            score = float(result.image_scores[index])
            called_defective = None if defective is None else bool(defective[index])
            drawn = self._pictures == "all" or (self._pictures == "defective" and bool(called_defective))
            anomaly_map = result.anomaly_maps[index]
            peak_row, peak_column = np.unravel_index(int(np.argmax(anomaly_map)), anomaly_map.shape)
            picture_name = self._picture_names.take(result.names[index])
            path = result.paths[index]
            row = {
                "name": result.names[index],
                # Whole: a later call, which appends, may have another current folder.
                "path": None if path is None else os.path.abspath(path),
                # Both are the very numbers that were compared: fewer digits would be another number, and
                # who compares them again could come to another decision.
                "score": score,
                "image_threshold": None if threshold is None else float(threshold),
                "defective": called_defective,
                "kind": None if kinds is None else kinds[index],
                "p_value": None if result.p_values is None else float(f"{result.p_values[index]:.6g}"),
                "peak_row": int(peak_row),
                "peak_column": int(peak_column),
                "picture": picture_name if drawn else None,
                "regions": None if regions is None else [_listed(region) for region in regions[index]],
            }
            self.rows.append(row)
            if self._maps:
                self._write_map(picture_name, anomaly_map)
            if source is None:
                continue
            box = result.scored_boxes[index]
            ignored = result.ignored[index] if result.ignored else None
            if self._scale is None:
                self._ranges.append(map_range(anomaly_map, box, ignored))
            if not drawn and not self._sheet.takes(score):
                continue
            truth = None if ground_truth is None else ground_truth[index]
            parts = {name: maps[index] for name, maps in result.part_maps.items()}
            pixels = read_image(source) if isinstance(source, Path) else source
            shown = _Shown(row, to_rgb8(pixels), anomaly_map, box, ignored, truth, parts)
            _check_sizes(shown)
            self._sheet.offer(shown)
            if not drawn:
                continue
            if self._scale is None:
                self._put_aside(shown)
            else:
                self._draw(shown, self._scale)

    def add_skipped(self, skipped: Iterable[SkippedImage]) -> None:
        """List files that could not be read, beyond those of the results."""
        self._skipped += skipped

    def _take_up(self) -> None:
        """Go on from the lists in the folder."""
        file = self.out / _LIST
        if not file.exists():
            if (self.out / "scores.csv").exists():
                raise InputError(f"append: {self.out} holds a scores.csv, but no {_LIST} to go on from")
            return
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            # Versions before this one had fewer columns.
            rows = [{**dict.fromkeys(_COLUMNS), **row} for row in content["images"]]
            self._earlier_skipped = [{"path": None, **one} for one in content["skipped"]]
            self._earlier = {_identity(row["name"], row["path"]) for row in rows}
            for row in rows:
                # In their order, so that every picture gets the name that it has.
                self._picture_names.take(row["name"])
            theirs = {name: content[name] for name in ("image_threshold", "pixel_threshold")}
            configuration = content["configuration"]
            if rows and content["heat_map_scale"] is not None:
                low, high = content["heat_map_scale"]
                self._scale = (low, high)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"append: {file} is no list of scores to go on from ({error})") from error
        if not rows:
            return  # of any detector
        ours = dict(zip(theirs, self._thresholds or theirs.values(), strict=True))
        differing = _differing(ours, theirs) + _differing(self._configuration, configuration)
        if differing:
            raise InputError(
                f"append: {file} lists scores of another detector (it differs in {', '.join(differing)}); "
                "name another folder, or score with that detector"
            )
        self._set_thresholds((theirs["image_threshold"], theirs["pixel_threshold"]))
        self.rows = rows

    def _set_thresholds(self, thresholds: tuple[float | None, float | None]) -> None:
        if self._thresholds not in (None, thresholds):
            raise InputError(
                f"a folder of scores has one pair of thresholds: {thresholds} given after {self._thresholds}"
            )
        if self._pictures == "defective" and thresholds[0] is None:
            raise InputError(
                'pictures: "defective" given, but without thresholds no image is called defective: calibrate '
                'the detector; allowed without are "all" and "none"'
            )
        self._thresholds = thresholds

    def _draw(self, shown: _Shown, scale: tuple[float, float]) -> None:
        name = str(shown.row["picture"])
        unscored: dict[str, Any] = {"scored_box": shown.scored_box, "ignored": shown.ignored}
        write_picture(
            self.out / "overlays" / name,
            overlay(shown.picture, shown.anomaly_map, *scale, **unscored),
        )
        if shown.part_maps:
            pictures = [fade_unscored(shown.picture, **unscored)]
            pictures += [
                overlay(shown.picture, part, *scale, **unscored) for part in shown.part_maps.values()
            ]
            write_picture(self.out / "parts" / name, np.hstack(pictures))
        mask = self._mask(shown)
        if mask is not None:
            marked = draw_contours(fade_unscored(shown.picture, **unscored), mask)
            write_picture(self.out / "contours" / name, marked)
            write_picture(self.out / "masks" / name, mask.astype(np.uint8) * np.uint8(255))

    def _mask(self, shown: _Shown) -> NDArray[np.bool_] | None:
        threshold = None if self._thresholds is None else self._thresholds[1]
        return None if threshold is None else shown.anomaly_map > threshold

    def _put_aside(self, shown: _Shown) -> None:
        if self._waiting is None:
            self._waiting = self._open.enter_context(working_folder(self.out, _UNFINISHED))
        arrays: dict[str, Any] = {
            "picture": shown.picture,
            "anomaly_map": shown.anomaly_map,
            "scored_box": shown.scored_box,
        }
        if shown.ignored is not None:
            arrays["ignored"] = shown.ignored
        arrays |= {_PART + name: part for name, part in shown.part_maps.items()}
        np.savez(self._waiting / f"{len(self._waiting_rows)}.npz", **arrays)
        self._waiting_rows.append(shown.row)

    def _draw_waiting(self) -> None:
        if self._scale is None and self._ranges:
            self._scale = scale_of_ranges(self._ranges)
        if self._waiting is None or self._scale is None:
            return
        for index, row in enumerate(self._waiting_rows):
            with np.load(self._waiting / f"{index}.npz") as kept:
                box = tuple(kept["scored_box"].tolist())
                parts = {
                    name.removeprefix(_PART): kept[name] for name in kept.files if name.startswith(_PART)
                }
                ignored = kept.get("ignored")
                shown = _Shown(row, kept["picture"], kept["anomaly_map"], box, ignored, None, parts)
                self._draw(shown, self._scale)

    def _finish(self) -> None:
        self._draw_waiting()
        highest = self._sheet.highest_first()
        if highest and self._scale is not None:
            masks = [mask for mask in map(self._mask, highest) if mask is not None]
            truths = [shown.ground_truth for shown in highest if shown.ground_truth is not None]
            sheet = comparison_sheet(
                [shown.picture for shown in highest],
                [shown.anomaly_map for shown in highest],
                masks=masks or None,
                ground_truth=truths if len(truths) == len(highest) else None,
                captions=[_caption(shown.row) for shown in highest],
                scale=self._scale,
                pixel_threshold=None if self._thresholds is None else self._thresholds[1],
                scored_boxes=[shown.scored_box for shown in highest],
                ignored=[shown.ignored for shown in highest],
                part_maps={
                    name: [shown.part_maps[name] for shown in highest] for name in highest[0].part_maps
                },
            )
            write_picture(self.out / "sheet.png", sheet)
        write_atomically(self.out / _LIST, self._as_json())
        write_atomically(self.out / "scores.csv", self._as_csv())

    def _as_json(self) -> bytes:
        image_threshold, pixel_threshold = self._thresholds or (None, None)
        skipped = [
            {
                "name": one.name,
                "path": None if one.path is None else os.path.abspath(one.path),
                "reason": one.reason,
            }
            for one in self._skipped
        ]
        # A file that was still being written when it was first looked at may have been scored by now.
        seen = {_identity(one["name"], one["path"]) for one in [*self.rows, *skipped]}
        earlier = [one for one in self._earlier_skipped if _identity(one["name"], one["path"]) not in seen]
        content = {
            "pydefect": VERSION,
            "configuration": None if self._configuration is None else dict(self._configuration),
            "image_threshold": image_threshold,
            "pixel_threshold": pixel_threshold,
            "heat_map_scale": self._scale,
            "images": self.rows,
            "skipped": earlier + skipped,
        }
        # json.dumps would hold each of very many numbers as a text of its own.
        encoded = bytearray()
        for text in json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(content):
            encoded += _encoded(text)
        encoded += b"\n"
        return bytes(encoded)

    def _as_csv(self) -> bytes:
        lines = _Lines()
        # Only a letter of this ending is quoted in a name, and both of them end a line for a reader.
        rows = csv.DictWriter(lines, _COLUMNS, lineterminator="\r\n")
        rows.writeheader()
        for row in self.rows:
            defective, regions = row["defective"], row["regions"]
            rows.writerow(
                {
                    **row,
                    "defective": "" if defective is None else str(defective).lower(),
                    "regions": None if regions is None else len(regions),
                }
            )
        return _encoded("".join(line.removesuffix("\r\n") + "\n" for line in lines))

    def _write_map(self, picture_name: str, anomaly_map: NDArray[np.float32]) -> None:
        values = np.asarray(anomaly_map, dtype=np.float32)
        path = self.out / "maps" / f"{picture_name.removesuffix('.png')}.tiff"
        write_atomically(path, _encoded_image(".tiff", values), durable=False)


def _identity(name: str, path: str | os.PathLike[str] | None) -> str:
    return name if path is None else os.path.abspath(path)


def _differing(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> list[str]:
    if ours is None or theirs is None:
        return [] if ours is theirs else ["configuration"]
    ours = json.loads(json.dumps(ours))  # as it was written
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


def _listed(region: Region) -> dict[str, float]:
    """One number a name, as an image's own peak has them: rows of a table."""
    numbers = (*region.box, region.area, *region.centroid, *region.peak, region.score)
    return dict(zip(_REGION, numbers, strict=True))


class _Lines(list[str]):
    """What a csv.writer writes into, one line at a time."""

    def write(self, line: str) -> None:
        self.append(line)


@dataclass(frozen=True)
class _Shown:
    """An image of which pictures are drawn."""

    row: dict[str, Any]
    picture: NDArray[np.uint8]
    anomaly_map: NDArray[np.float32]
    scored_box: Box
    ignored: NDArray[np.bool_] | None
    ground_truth: NDArray[Any] | None
    part_maps: dict[str, NDArray[np.float32]]


class _HighestScores:
    """The few images with the highest scores, small enough to be kept."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[float, int, _Shown]] = []
        self._offered = 0

    def takes(self, score: float) -> bool:
        """Whether an image with this score would be among them."""
        return self._count > len(self._heap) or (self._count > 0 and score > self._heap[0][0])

    def offer(self, shown: _Shown) -> None:
        score = float(shown.row["score"])
        self._offered += 1
        if not self.takes(score):
            return
        # Of equal scores the first one stays, and no two images are ever compared themselves.
        heapq.heappush(self._heap, (score, -self._offered, _made_smaller(shown)))
        if len(self._heap) > self._count:
            heapq.heappop(self._heap)

    def highest_first(self) -> list[_Shown]:
        return [shown for _, _, shown in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


def _made_smaller(shown: _Shown) -> _Shown:
    picture, anomaly_map, box = shrink(shown.picture, shown.anomaly_map, shown.scored_box, _SHEET_EDGE)
    ignored, truth = (
        None if mask is None else shrink_mask(mask, (picture.shape[0], picture.shape[1]))
        for mask in (shown.ignored, shown.ground_truth)
    )
    parts = {
        name: shrink(shown.picture, part, shown.scored_box, _SHEET_EDGE)[1]
        for name, part in shown.part_maps.items()
    }
    return _Shown(shown.row, picture, anomaly_map, box, ignored, truth, parts)


class _PictureNames:
    """Gives every image a file name of its own below a folder, whatever its name is."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._taken: set[str] = set()  # files and folders
        # How far equal names have come: every part of a shift may be a top.png in a folder of its own.
        self._reached: dict[str, tuple[list[str], str, int]] = {}

    def take(self, name: str) -> str:
        parts = [_safe_part(part) for part in name.replace("\\", "/").split("/")]
        parts = [part for part in parts if part] or ["image"]
        parts[-1] = parts[-1].removesuffix(".png") or "image"
        whole = "/".join(parts)
        folders, last, first = self._reached.get(whole, (parts[:-1], parts[-1], 2))
        for number in itertools.count(first):
            candidate = "/".join([*folders, f"{last}.png"])
            # Windows and macOS take a.png and A.png for one file. An image's map is a .tiff of that name.
            keys = {candidate.casefold(), f"{candidate.removesuffix('.png')}.tiff".casefold()}
            if any(folder in self._files for folder in _folders_of(candidate.casefold())):
                folders = [f"{part}-{number}" for part in parts[:-1]]
            elif not keys.isdisjoint(self._taken):
                last = f"{parts[-1]}-{number}"
            else:
                break
        if number > 2:
            self._reached[whole] = folders, last, number
        self._files |= keys
        self._taken |= keys
        self._taken.update(_folders_of(candidate.casefold()))
        return candidate


def _folders_of(key: str) -> Iterator[str]:
    parts = key.split("/")
    return ("/".join(parts[:end]) for end in range(1, len(parts)))


def _safe_part(part: str) -> str:
    if part in (".", ".."):
        return ""
    part = "".join("_" if ord(letter) < 32 or letter in ':*?"<>|' else letter for letter in part)
    while len(os.fsencode(part)) > _LONGEST_NAME:
        part = part[1:]
    return part


def _thresholds_of(result: Result) -> tuple[float | None, float | None]:
    return result.image_threshold, result.pixel_threshold


def _sources_of(result: Result, images: Any) -> Iterator[Path | NDArray[Any]]:
    """Pixels, or the file to read them from: of most images of most lines nobody needs them again."""
    if images is None:
        for name, path in zip(result.names, result.paths, strict=True):
            if path is None:
                raise InputError(
                    f'{name} did not come from a file: give its pixels with images=, or pictures="none"'
                )
            yield path
        return
    # What could not be read was left out of the result too, and so was what could not be scored.
    left_out = {one.name for one in result.skipped}.difference(result.names)
    count = 0
    for image in open_images(images, on_error="skip"):
        if image.name in left_out:
            continue
        count += 1
        if count > len(result):
            break
        yield image.pixels
    if count != len(result):
        what = "more" if count > len(result) else "fewer"
        raise InputError(f"images: there are {what} than the {len(result)} of the result")


def _check_sizes(shown: _Shown) -> None:
    for what, array in (("anomaly map", shown.anomaly_map), ("ground truth", shown.ground_truth)):
        if array is not None and np.shape(array) != shown.picture.shape[:2]:
            raise InputError(
                f"{shown.row['name']}: the image is {list(shown.picture.shape[:2])} (height, width), its "
                f"{what} {list(np.shape(array))}; they must be the same"
            )


def _caption(row: Mapping[str, Any]) -> str:
    verdict = {None: "", True: f"  {row['kind'] or 'defective'}", False: "  good"}[row["defective"]]
    name = " ".join(row["name"].splitlines())
    return f"{name}\nscore {row['score']:.3g}{verdict}"


def _encoded(text: str) -> bytes:
    # Names of files may hold bytes that are no text.
    return text.encode("utf-8", "backslashreplace")


def _encoded_image(ending: str, values: NDArray[Any]) -> bytes:
    worked, data = cv2.imencode(ending, values)
    if not worked:
        raise OSError(f"OpenCV could not encode a picture as {ending}")
    return bytes(data.tobytes())
