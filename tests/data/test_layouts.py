from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from pydefect.data.images import read_image
from pydefect.data.layouts import (
    Dataset,
    DefectKind,
    Sample,
    defective_images,
    held_out_images,
    read_dataset,
    read_defects_config,
    read_mask,
    read_regions,
    training_images,
)
from pydefect.errors import InputError


def touch(root: Path, *names: str) -> None:
    """Files with the names of images: no reader of a layout opens one."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def names(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def masks(dataset: Dataset) -> dict[str, list[str]]:
    return {
        sample.image.relative_to(dataset.root).as_posix(): names(list(sample.masks), dataset.root)
        for sample in dataset.test
        if sample.masks
    }


def mvtec(root: Path) -> Path:
    touch(
        root, "train/good/10.png", "train/good/2.png", "test/good/0.png", "test/hole/0.png", "test/hole/1.png"
    )
    touch(root, "ground_truth/hole/0_mask.png", "ground_truth/hole/1_mask.png", "readme.txt")
    return root


class TestMVTec:
    def test_read(self, tmp_path: Path) -> None:
        root = mvtec(tmp_path / "bottle")
        dataset = read_dataset(root)
        assert (dataset.name, dataset.layout, dataset.root) == ("bottle", "mvtec_ad", root)
        assert names([sample.image for sample in dataset.train], root) == [
            "train/good/2.png",
            "train/good/10.png",
        ]
        assert dataset.validation == ()
        assert [(sample.defect, sample.label) for sample in dataset.test] == [
            ("good", 0),
            ("hole", 1),
            ("hole", 1),
        ]
        assert masks(dataset)["test/hole/1.png"] == ["ground_truth/hole/1_mask.png"]

    def test_masks_named_like_the_images(self, tmp_path: Path) -> None:
        # VisA as its own script writes it for PyTorch.
        touch(tmp_path, "train/good/0.JPG", "test/good/1.JPG", "test/bad/0.JPG", "ground_truth/bad/0.png")
        assert masks(read_dataset(tmp_path)) == {"test/bad/0.JPG": ["ground_truth/bad/0.png"]}

    def test_a_mask_without_a_name_belongs_to_no_image(self, tmp_path: Path) -> None:
        mvtec(tmp_path)
        touch(tmp_path, "ground_truth/hole/_mask.png", "ground_truth/hole/deep/_mask.png")
        assert masks(read_dataset(tmp_path)) == {
            "test/hole/0.png": ["ground_truth/hole/0_mask.png"],
            "test/hole/1.png": ["ground_truth/hole/1_mask.png"],
        }

    def test_a_missing_mask_is_not_known(self, tmp_path: Path) -> None:
        root = mvtec(tmp_path)
        (root / "ground_truth/hole/1_mask.png").unlink()
        sample = read_dataset(root).test[2]
        assert sample.masks == ()
        with pytest.raises(InputError, match=r"hole/1.png: no mask is known"):
            read_mask(sample, (4, 4))

    @pytest.mark.parametrize(
        ("good", "masks_of"), [("ok", "ground_truth"), ("Normal", "masks"), ("OK", "Mask")]
    )
    def test_other_names_of_good_and_of_masks(self, tmp_path: Path, good: str, masks_of: str) -> None:
        # BTAD: ok and ko.
        touch(tmp_path, f"train/{good}/0.bmp", f"test/{good}/1.bmp", "test/ko/0.bmp", f"{masks_of}/ko/0.png")
        dataset = read_dataset(tmp_path)
        assert dataset.layout == "mvtec_ad"
        assert [(sample.defect, sample.label) for sample in dataset.test] == [("ko", 1), ("good", 0)]
        assert masks(dataset) == {"test/ko/0.bmp": [f"{masks_of}/ko/0.png"]}
        assert names(defective_images(tmp_path), tmp_path) == ["test/ko/0.bmp"]

    def test_masks_beside_the_images(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/good/0.png", "test/hole/0.png", "test/hole/0_mask.png", "test/hole/1_mask.png")
        dataset = read_dataset(tmp_path)
        # One without the image is an image.
        assert names([sample.image for sample in dataset.test], tmp_path) == [
            "test/hole/0.png",
            "test/hole/1_mask.png",
        ]
        assert masks(dataset) == {"test/hole/0.png": ["test/hole/0_mask.png"]}

    def test_masks_that_fit_no_image(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/good/0.png", "test/bad/0.png", "ground_truth/bad/zero.png")
        with pytest.raises(InputError, match="none of the masks fits"):
            read_dataset(tmp_path)

    @pytest.mark.parametrize("mask", ["ground_truth/Bad/0_mask.png", "ground_truth/0_mask.png"])
    def test_masks_of_no_defect(self, tmp_path: Path, mask: str) -> None:
        touch(tmp_path, "train/good/0.png", "test/bad/0.png", "test/cut/0.png", mask)
        with pytest.raises(InputError, match=r"0_mask.png: no mask in .* fits an image; .*: bad, cut"):
            read_dataset(tmp_path)

    def test_masks_of_good_images_only(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/good/0.png", "test/bad/0.png", "test/good/0.png", "ground_truth/good/0.png")
        assert not any(sample.masks for sample in read_dataset(tmp_path).test)

    @pytest.mark.parametrize(
        ("missing", "made"), [("train/good", "test/a/0.png"), ("test", "train/good/0.png")]
    )
    def test_missing_part(self, tmp_path: Path, missing: str, made: str) -> None:
        touch(tmp_path, made)
        with pytest.raises(InputError, match=f"no folder {missing}"):
            read_dataset(tmp_path, layout="mvtec_ad")


class TestLoco:
    def test_several_masks_of_one_image(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/good/0.png", "validation/good/0.png", "test/good/0.png")
        touch(tmp_path, "test/logical_anomalies/000.png", "test/structural_anomalies/000.png")
        touch(tmp_path, *(f"ground_truth/logical_anomalies/000/00{n}.png" for n in (1, 0)))
        touch(tmp_path, "ground_truth/structural_anomalies/000_mask.png")
        dataset = read_dataset(tmp_path)
        assert (dataset.layout, len(dataset.validation)) == ("mvtec_loco", 1)
        assert masks(dataset) == {
            "test/logical_anomalies/000.png": [
                "ground_truth/logical_anomalies/000/000.png",
                "ground_truth/logical_anomalies/000/001.png",
            ],
            "test/structural_anomalies/000.png": ["ground_truth/structural_anomalies/000_mask.png"],
        }

    def test_known_by_its_masks_without_validation(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/good/0.png", "test/a/0.png", "ground_truth/a/0/000.png")
        assert read_dataset(tmp_path).layout == "mvtec_loco"


class TestRegions:
    """Annotated regions and their saturation areas, as MVTec LOCO AD's evaluation has them."""

    ENTRIES = (
        {
            "defect_name": "missing",
            "pixel_value": 255,
            "saturation_threshold": 5,
            "relative_saturation": False,
        },
        {
            "defect_name": "dirt",
            "pixel_value": 254,
            "saturation_threshold": 0.5,
            "relative_saturation": True,
        },
    )

    @pytest.fixture
    def sample(self, tmp_path: Path) -> Sample:
        """One region of 12 pixels of each kind; they overlap in 4."""
        (tmp_path / "defects_config.json").write_text(json.dumps(self.ENTRIES))
        first, second = np.zeros((2, 8, 10), np.uint8)
        first[0:3, 0:4] = 255
        second[1:5, 2:5] = 254
        for name, values in (("000.png", first), ("001.png", second)):
            cv2.imwrite(str(tmp_path / name), values)
        return Sample(
            tmp_path / "image.png", "logical_anomalies", (tmp_path / "000.png", tmp_path / "001.png")
        )

    def test_absolute_and_relative_saturation(self, sample: Sample) -> None:
        kinds = read_defects_config(sample.image.parent)
        assert kinds == {
            255: DefectKind("missing", 255, 5, False),
            254: DefectKind("dirt", 254, 0.5, True),
        }
        first, second = read_regions(sample, (8, 10), kinds)
        assert (first.mask.sum(), first.saturation) == (12, 5)
        assert (second.mask.sum(), second.saturation) == (12, 6)
        union = first.mask | second.mask
        assert np.array_equal(union, read_mask(sample, (8, 10)))
        few = {255: DefectKind("missing", 255, 500, False), 254: DefectKind("dirt", 254, 0.01, True)}
        assert [region.saturation for region in read_regions(sample, (8, 10), few)] == [12, 1]

    def test_inside_a_box(self, sample: Sample) -> None:
        kinds = read_defects_config(sample.image.parent)
        assert kinds is not None
        first, second = read_regions(sample, (8, 10), kinds, (2, 2, 6, 10))
        assert first.mask.shape == second.mask.shape == (4, 8)
        assert (first.mask.sum(), first.saturation) == (2, 2)
        assert (second.mask.sum(), second.saturation) == (9, 4)
        assert len(read_regions(sample, (8, 10), kinds, (3, 0, 8, 10))) == 1

    def test_without_what_is_ignored(self, sample: Sample) -> None:
        """As if nothing had been marked there, inside the box and out."""
        kinds = read_defects_config(sample.image.parent)
        assert kinds is not None
        for first_column, left in ((2, 2), (0, 1)):
            ignored = np.zeros((8, 10), dtype=bool)
            ignored[:, :first_column] = True
            found = read_regions(sample, (8, 10), kinds, (0, 1, 8, 10), ignored)
            expected = read_regions(sample, (8, 10), kinds, (0, left, 8, 10))
            assert [(region.mask.sum(), region.saturation) for region in found] == [
                (region.mask.sum(), region.saturation) for region in expected
            ]
        assert read_regions(sample, (8, 10), kinds, None, np.ones((8, 10), dtype=bool)) == []

    def test_absolute_saturation_follows_the_size(self, sample: Sample) -> None:
        kinds = read_defects_config(sample.image.parent)
        assert kinds is not None
        first, second = read_regions(sample, (16, 20), kinds)
        assert (first.mask.sum(), first.saturation) == (48, 20)
        assert (second.mask.sum(), second.saturation) == (48, 24)

    def test_good_images_and_sets_without_the_file(self, sample: Sample, tmp_path: Path) -> None:
        assert read_regions(Sample(sample.image, "good"), (8, 10), {}) == []
        assert read_defects_config(tmp_path / "nowhere") is None
        with pytest.raises(InputError, match=r"image\.png: no mask is known"):
            read_regions(Sample(sample.image, "dirt"), (8, 10), {})

    @pytest.mark.parametrize("values", [[1], [254, 255]])
    def test_marks_of_no_kind_or_of_several(self, sample: Sample, values: list[int]) -> None:
        kinds = read_defects_config(sample.image.parent)
        assert kinds is not None
        cv2.imwrite(str(sample.masks[0]), np.resize(np.uint8(values), (8, 10)))
        with pytest.raises(
            InputError, match=r"000\.png: marked with .*; a mask must have one value.*254, 255"
        ):
            read_regions(sample, (8, 10), kinds)

    def test_an_empty_mask_has_no_region(self, sample: Sample) -> None:
        kinds = read_defects_config(sample.image.parent)
        assert kinds is not None
        cv2.imwrite(str(sample.masks[0]), np.zeros((8, 10), np.uint8))
        assert len(read_regions(sample, (8, 10), kinds)) == len(sample.masks) - 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"pixel_value": 0}, "pixel_value is 0"),
            ({"pixel_value": "255"}, "pixel_value is '255'"),
            ({"saturation_threshold": 1.5}, "saturation_threshold is 1.5; it must be a share"),
            ({"saturation_threshold": -1, "relative_saturation": False}, "it must be a number of pixels"),
            ({"relative_saturation": 1}, "relative_saturation is 1"),
            ({"pixel_value": 255}, "two kinds of defects have the same pixel_value"),
        ],
    )
    def test_wrong_config(self, tmp_path: Path, change: dict[str, object], message: str) -> None:
        entries = [self.ENTRIES[0], self.ENTRIES[1] | change]
        (tmp_path / "defects_config.json").write_text(json.dumps(entries))
        with pytest.raises(InputError, match=f"defects_config.json: .*{message}"):
            read_defects_config(tmp_path)
        (tmp_path / "defects_config.json").write_text('[{"defect_name": "a"}]')
        with pytest.raises(InputError, match=r"defects_config\.json: not a list of kinds"):
            read_defects_config(tmp_path)


class TestVisA:
    @pytest.fixture
    def visa(self, tmp_path: Path) -> Path:
        lines = ["object,split,label,image,mask"]
        for number, (split, label) in enumerate(
            [("train", "normal"), ("test", "normal"), ("test", "anomaly")]
        ):
            image, mask = (
                f"candle/Data/Images/{label}/{number}.JPG",
                f"candle/Data/Masks/{label}/{number}.png",
            )
            touch(tmp_path, image)
            if label == "anomaly":
                touch(tmp_path, mask)
            lines.append(f"candle,{split},{label},{image},{mask if label == 'anomaly' else ''}")
        touch(tmp_path, "split_csv/1cls.csv", "capsules/Data/Images/Normal/0.JPG")
        (tmp_path / "split_csv/1cls.csv").write_text(
            "\n".join([*lines, "capsules,train,normal,capsules/x.JPG,"])
        )
        return tmp_path

    def test_read(self, visa: Path) -> None:
        dataset = read_dataset(visa / "candle")
        assert (dataset.name, dataset.layout) == ("candle", "visa")
        assert [sample.label for sample in dataset.train] == [0]
        assert [sample.defect for sample in dataset.test] == ["good", "anomaly"]
        assert masks(dataset) == {"Data/Images/anomaly/2.JPG": ["Data/Masks/anomaly/2.png"]}

    def test_names_are_relative_whichever_way_the_folder_is_written(
        self, visa: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (visa / "link").symlink_to(visa / "candle")
        monkeypatch.chdir(visa)
        expected = ["Data/Images/normal/0.JPG", "Data/Images/normal/1.JPG", "Data/Images/anomaly/2.JPG"]
        for root in (visa / "candle", "candle", "./split_csv/../candle", "link", visa / "link"):
            dataset = read_dataset(root)
            assert dataset.layout == "visa"
            samples = [*dataset.train, *dataset.test]
            assert names([sample.image for sample in samples], dataset.root) == expected
            assert all(sample.image.is_file() for sample in samples)
            assert masks(dataset) == {"Data/Images/anomaly/2.JPG": ["Data/Masks/anomaly/2.png"]}
        monkeypatch.chdir(visa / "candle")
        assert [sample.image.as_posix() for sample in read_dataset(".").train] == expected[:1]

    def test_a_defect_among_the_training_images_is_refused(self, visa: Path) -> None:
        split = visa / "split_csv" / "1cls.csv"
        text = split.read_text(encoding="utf-8")
        assert ",test,anomaly," in text
        split.write_text(text.replace(",test,anomaly,", ",train,anomaly,", 1), encoding="utf-8")
        with pytest.raises(InputError, match="is among the training or validation images"):
            read_dataset(visa / "candle")

    def test_root_names_its_categories(self, visa: Path) -> None:
        with pytest.raises(InputError, match=r"several data sets.*: candle"):
            read_dataset(visa)

    def test_errors(self, visa: Path) -> None:
        with pytest.raises(InputError, match=r"capsules/x\.JPG: missing"):
            read_dataset(visa / "capsules")
        with pytest.raises(InputError, match="no category of VisA"):
            read_dataset(visa / "split_csv", layout="visa")
        (visa / "split_csv/1cls.csv").write_text("object,image\ncandle,a.png\n")
        with pytest.raises(InputError, match="columns split, label, mask are missing"):
            read_dataset(visa / "candle")


class TestMagneticTile:
    def test_read(self, tmp_path: Path) -> None:
        touch(tmp_path, *(f"MT_Free/Imgs/{n}.{ending}" for n in range(10) for ending in ("jpg", "png")))
        touch(
            tmp_path, "MT_Blowhole/Imgs/a.jpg", "MT_Blowhole/Imgs/a.png", "MT_Crack/Imgs/b.jpg", "README.md"
        )
        dataset = read_dataset(tmp_path)
        assert dataset.layout == "magnetic_tile"
        assert Counter(sample.defect for sample in dataset.test) == {"good": 2, "blowhole": 1, "crack": 1}
        assert masks(dataset) == {"MT_Blowhole/Imgs/a.jpg": ["MT_Blowhole/Imgs/a.png"]}
        everything = [sample.image for sample in (*dataset.train, *dataset.test)]
        assert len(dataset.train) == 8
        assert len(set(everything)) == len(everything) == 12
        assert read_dataset(tmp_path, seed=0) == dataset
        assert any(read_dataset(tmp_path, seed=seed).train != dataset.train for seed in range(1, 4))

    def test_missing_part(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no folder MT_Free/Imgs"):
            read_dataset(tmp_path, layout="magnetic_tile")


class TestFolder:
    def test_images_alone_are_good_training_images(self, tmp_path: Path) -> None:
        touch(tmp_path, "10.png", "2.png", "monday/1.png")
        dataset = read_dataset(tmp_path)
        assert (dataset.layout, dataset.test) == ("folder", ())
        assert names([sample.image for sample in dataset.train], tmp_path) == [
            "2.png",
            "10.png",
            "monday/1.png",
        ]
        assert {sample.label for sample in dataset.train} == {0}

    @pytest.mark.parametrize("train", ["train/0.png", "train/good/0.png"])
    def test_train_and_flat_test(self, tmp_path: Path, train: str) -> None:
        touch(tmp_path, train, "test/0.png")
        dataset = read_dataset(tmp_path)
        assert [sample.label for sample in dataset.train] == [0]
        assert [(sample.defect, sample.label) for sample in dataset.test] == [("unknown", None)]
        with pytest.raises(InputError, match="no mask is known"):
            read_mask(dataset.test[0], (2, 2))

    def test_train_and_labelled_test(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/0.png", "test/good/0.png", "test/bent/0.png")
        assert [sample.defect for sample in read_dataset(tmp_path).test] == ["bent", "good"]

    @pytest.mark.parametrize("flat", [False, True])
    def test_train_and_test_with_masks(self, tmp_path: Path, flat: bool) -> None:
        touch(tmp_path, "train/0.png", "test/good/0.png", "test/crack/0.png", "test/1.png")
        mask = "ground_truth/0_mask.png" if flat else "ground_truth/crack/0_mask.png"
        touch(tmp_path, mask)
        dataset = read_dataset(tmp_path)
        assert dataset.layout == "folder"
        assert [sample.label for sample in dataset.test] == [None, 1, 0]
        assert masks(dataset) == {"test/crack/0.png": [mask]}

    def test_good_defects_and_masks_side_by_side(self, tmp_path: Path) -> None:
        # anomalib's folders.
        touch(tmp_path, *(f"good/{n}.png" for n in range(10)), "crack/0.png", "crack/1.png", "dent/0.png")
        touch(tmp_path, "mask/crack/0.png", "mask/dent/0.png")
        dataset = read_dataset(tmp_path)
        assert Counter(sample.defect for sample in dataset.test) == {"good": 2, "crack": 2, "dent": 1}
        assert masks(dataset) == {
            "crack/0.png": ["mask/crack/0.png"],
            "dent/0.png": ["mask/dent/0.png"],
        }

    @pytest.mark.parametrize(
        ("good", "defective"),
        [
            ("OK", "NG"),
            ("normal", "abnormal"),
            ("Good", "Scratch"),
            ("Pass", "Fail"),
            ("i.O.", "n.i.O."),
        ],
    )
    def test_defective_images_are_never_learned_from(self, tmp_path: Path, good: str, defective: str) -> None:
        touch(tmp_path, *(f"{good}/{n}.png" for n in range(5)), f"{defective}/0.png")
        assert {path.parent.name for path in training_images(tmp_path)} == {good}
        assert names(defective_images(tmp_path), tmp_path) == [f"{defective}/0.png"]

    @pytest.mark.parametrize(("root", "seen"), [("", ""), ("train", "train/"), ("", "line/")])
    def test_folders_of_defects_beside_folders_of_no_name_are_refused(
        self, tmp_path: Path, root: str, seen: str
    ) -> None:
        touch(tmp_path, f"{seen}monday/0.png", f"{seen}NG/0.png", *(["test/good/0.png"] if root else []))
        with pytest.raises(InputError, match="holds folders named ng beside others; call the good images'"):
            training_images(tmp_path)

    @pytest.mark.parametrize("held_out", ["good_test", "Normal-Test", "test_ok"])
    @pytest.mark.parametrize("masks_of", ["mask", "GT", "groundtruth", "mask_dir"])
    def test_good_images_that_are_held_out_are_no_defect(
        self, tmp_path: Path, held_out: str, masks_of: str
    ) -> None:
        # anomalib's normal_dir, normal_test_dir, abnormal_dir and mask_dir.
        touch(tmp_path, *(f"good/{n}.png" for n in range(5)), f"{held_out}/a.png", "crack/0.png")
        assert len(training_images(tmp_path)) == 5
        touch(tmp_path, f"{masks_of}/crack/0.png")
        dataset = read_dataset(tmp_path)
        assert len(dataset.train) == 5
        assert [(sample.image.parent.name, sample.defect) for sample in dataset.test] == [
            (held_out, "good"),
            ("crack", "crack"),
        ]
        assert masks(dataset) == {"crack/0.png": [f"{masks_of}/crack/0.png"]}

    def test_good_beside_held_out_good_images_only(self, tmp_path: Path) -> None:
        touch(tmp_path, "normal/0.png", "normal/1.png", "normal_test/0.png")
        assert names(training_images(tmp_path), tmp_path) == ["normal/0.png", "normal/1.png"]

    @pytest.mark.parametrize("root", ["", "test/"])
    @pytest.mark.parametrize(
        ("folder", "message"),
        [
            ("good_2", "good_2, which could be good images or a defect"),
            ("Normal old", "Normal old, which could be"),
            (
                "bottle/good",
                "bottle would be a defect, but holds a folder good: several products"
                "|folders named good and others",
            ),
        ],
    )
    def test_what_may_be_good_is_no_defect(
        self, tmp_path: Path, root: str, folder: str, message: str
    ) -> None:
        touch(tmp_path, f"{root}good/0.png", f"{root}good/1.png", f"{root}crack/0.png")
        if root:
            touch(tmp_path, "train/good/0.png")
        read_dataset(tmp_path)
        touch(tmp_path, f"{root}{folder}/0.png")
        with pytest.raises(InputError, match=message):
            read_dataset(tmp_path)

    @pytest.mark.parametrize(
        "defect", ["not_good", "abnormal", "ab-normal", "nicht_ok", "no good", "不ok", "не ok", "未pass"]
    )
    @pytest.mark.parametrize("root", ["", "test/"])
    def test_defects_that_are_called_not_good(self, tmp_path: Path, root: str, defect: str) -> None:
        touch(tmp_path, f"{root}good/0.png", f"{root}good/1.png", f"{root}{defect}/0.png")
        if root:
            touch(tmp_path, "train/0.png")
        dataset = read_dataset(tmp_path)
        assert not any(sample.image.parent.name == defect for sample in dataset.train)
        assert {sample.image.parent.name: sample.label for sample in dataset.test}[defect] == 1
        assert Sample("a.png", defect).label == 1

    @pytest.mark.parametrize("names_of", [("io", "cpu", "psu"), ("pass", "seal")])
    def test_words_that_may_mean_something_else(self, tmp_path: Path, names_of: tuple[str, ...]) -> None:
        """Boards by their kind, say: all are good training images, as folders of any name."""
        touch(tmp_path, *(f"{name}/{n}.png" for name in names_of for n in range(2)))
        assert len(training_images(tmp_path)) == 2 * len(names_of)
        touch(tmp_path, "own/train/io/0.png", "own/test/io/0.png", "own/test/scratch/0.png")
        assert [sample.label for sample in read_dataset(tmp_path / "own").test] == [0, 1]

    @pytest.mark.parametrize(("changed", "moved"), [("000a.png", 1), ("005.png", 1), ("more", 20)])
    def test_a_changed_folder_moves_few_images(self, tmp_path: Path, changed: str, moved: int) -> None:
        touch(tmp_path, *(f"good/{n:03d}.png" for n in range(100)), "hole/0.png")
        before = set(training_images(tmp_path))
        if changed == "more":
            touch(tmp_path, *(f"good/{n:03d}.png" for n in range(100, 150)))
        elif changed == "005.png":
            (tmp_path / "good" / changed).unlink()
        else:
            touch(tmp_path, f"good/{changed}")
        tested = {sample.image for sample in read_dataset(tmp_path).test}
        # An added image changes the share by one place; of 50 new ones a fifth is tested.
        assert len(tested & before) <= (moved if changed != "more" else 5)

    def test_good_beside_defects_is_split(self, tmp_path: Path) -> None:
        touch(tmp_path, *(f"good/{n}.png" for n in range(5)), "bent/0.png", "scratch/0.png")
        dataset = read_dataset(tmp_path)
        assert len(dataset.train) == 4
        assert [sample.defect for sample in dataset.test] == ["good", "bent", "scratch"]

    def test_images_beside_good(self, tmp_path: Path) -> None:
        touch(tmp_path, "good/0.png", "bent/0.png", "1.png")
        with pytest.raises(InputError, match="images beside its folder good"):
            read_dataset(tmp_path)


class TestTrainingImages:
    @pytest.mark.parametrize("place", ["", "train", "train/good"])
    def test_never_a_test_image_or_a_mask(self, tmp_path: Path, place: str) -> None:
        root = mvtec(tmp_path)
        assert names(training_images(root / place), root) == ["train/good/2.png", "train/good/10.png"]

    def test_plain_folder_and_file(self, tmp_path: Path) -> None:
        touch(tmp_path, "b/1.png", "a/2.png", "a/1.png")
        assert names(training_images(tmp_path), tmp_path) == ["a/1.png", "a/2.png", "b/1.png"]
        assert training_images(tmp_path / "b/1.png") == [tmp_path / "b/1.png"]

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (["test/good/0.png", "test/bent/0.png"], "folders named test"),
            (["images/0.png", "ground_truth/0.png"], "folders named ground_truth"),
            (["a/b/train/good/0.png", "a/b/test/good/0.png"], "folders named test"),
            (["images/0.png", "GT/0.png"], "folders named gt"),
            (["a/good/0.png", "a/bent/0.png"], "folders named good and others"),
            (["train/good/0.png", "train/bent/0.png"], "folders named good and others"),
            (["bottle/train/good/0.png", "bottle/test/good/0.png"], "several data sets; .*: bottle"),
            (["notes.txt"], "no images"),
            (["train/notes.txt", "test/0.png"], "no training images"),
        ],
    )
    def test_what_could_hold_other_than_good_images_is_refused(
        self, tmp_path: Path, files: list[str], message: str
    ) -> None:
        touch(tmp_path, *files)
        with pytest.raises(InputError, match=message):
            training_images(tmp_path)

    def test_the_test_part_is_not_learned_from(self, tmp_path: Path) -> None:
        root = mvtec(tmp_path)
        with pytest.raises(InputError, match="test is the test part of a data set; its training part lies"):
            training_images(root / "test")
        assert len(defective_images(root / "test")) == 2


class TestList:
    @pytest.fixture
    def listed(self, tmp_path: Path) -> Path:
        touch(tmp_path, "a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png", "v.png", "m/0.png", "m/1.png")
        elsewhere = tmp_path / "m" / "1.png"
        lines = [
            "image,split,label,mask,camera",
            "a/0.png,train,OK,m/0.png,7",
            "a/1.png,train,,,7",
            "v.png,validation,good,,7",
            "b/0.png,test,normal,,8",
            f"b/1.png,test,crack,m/0.png; {elsewhere},8",
            "b/2.png,test,,,8",
        ]
        path = tmp_path / "line 7.csv"
        path.write_text("\n".join(lines), encoding="utf-8-sig")
        return path

    def test_read(self, listed: Path) -> None:
        dataset = read_dataset(listed)
        assert (dataset.name, dataset.layout, dataset.root) == ("line 7", "list", listed.parent)
        assert names([sample.image for sample in dataset.train], dataset.root) == ["a/0.png", "a/1.png"]
        assert [sample.defect for sample in dataset.test] == ["good", "crack", "unknown"]
        assert masks(dataset) == {"b/1.png": ["m/0.png", "m/1.png"]}
        assert read_dataset(listed, layout="list") == dataset
        assert names(training_images(listed), dataset.root) == ["a/0.png", "a/1.png"]
        assert names(held_out_images(listed), dataset.root) == ["v.png"]
        assert names(defective_images(listed), dataset.root) == ["b/1.png"]

    def test_without_masks(self, listed: Path) -> None:
        listed.write_text("split,image,label\ntrain,a/0.png,good\n", encoding="utf-8")
        assert read_dataset(listed).train == (Sample(listed.parent / "a/0.png", "good"),)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                ("split,label", "part,label"),
                "the columns split are missing; a list of images has image, split",
            ),
            (("a/1.png,train", "a/1.png,learn"), "line 3: split is 'learn'; allowed are train, validation"),
            (("a/1.png,train", ",train"), "line 3: image is empty"),
            (("a/1.png,train", "a/9.png,train"), r"line 3: .*9\.png is missing"),
            (("m/0.png;", "m/9.png;"), r"line 6: .*9\.png is missing"),
            (("a/1.png,train,,", "a/1.png,train,crack,"), r"1\.png \(crack\) is among the training"),
            (("a/1.png", '"a/1.png'), r"line 3: no CSV \(unexpected end of data\)"),
            (("a/1.png", '"a"/1.png'), r"line 3: no CSV \(',' expected after"),
            (("image,", '"image,'), r"line 1: no CSV \(unexpected end of data\)"),
        ],
    )
    def test_what_is_wrong_has_its_line(self, listed: Path, change: tuple[str, str], message: str) -> None:
        text = listed.read_text(encoding="utf-8-sig")
        assert change[0] in text
        listed.write_text(text.replace(*change), encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_dataset(listed)

    @pytest.mark.parametrize("label", ["1", "0.0", "True", "no"])
    def test_a_label_is_a_name(self, listed: Path, label: str) -> None:
        text = listed.read_text(encoding="utf-8-sig")
        listed.write_text(text.replace("b/2.png,test,", f"b/2.png,test,{label}"), encoding="utf-8")
        with pytest.raises(InputError, match=f"line 7: label is '{label}'; it must be good, a defect's name"):
            read_dataset(listed)

    def test_as_excel_writes_it(self, listed: Path) -> None:
        before = read_dataset(listed)
        text = listed.read_text(encoding="utf-8-sig").replace("m/0.png; ", "m/0.png#")
        text = text.replace(",", ";").replace("image;split", "Image; Split")
        text = "\n".join(
            ";".join(f'"{cell}"' if "#" in cell else cell for cell in line.split(";"))
            for line in text.split("\n")
        ).replace("#", ";")
        listed.write_text(text, encoding="utf-8-sig")
        assert read_dataset(listed) == before
        listed.write_bytes("image,split,label\na/0.png,train,größe".encode("cp1252"))
        with pytest.raises(InputError, match=r"no UTF-8 .*; save it as CSV UTF-8"):
            read_dataset(listed)

    def test_an_empty_list(self, listed: Path) -> None:
        listed.write_text("image,split,label\n", encoding="utf-8")
        with pytest.raises(InputError, match="there are no images in it"):
            read_dataset(listed)
        with pytest.raises(InputError, match="is a folder; it must be a CSV file"):
            read_dataset(listed.parent, layout="list")


class TestDataset:
    @pytest.mark.parametrize("part", ["train", "validation"])
    def test_a_defect_is_no_good_image(self, part: str) -> None:
        parts = {"train": (), "validation": (), "test": ()} | {part: (Sample("a.png", "crack"),)}
        with pytest.raises(InputError, match=r"a\.png \(crack\) is among the training or validation images"):
            Dataset("mine", "folder", Path(), **parts)


class TestSample:
    @pytest.mark.parametrize("good", ["good", "Good", "normal", "OK", "pass"])
    def test_every_name_of_good(self, good: str) -> None:
        assert Sample("a.png", good) == Sample(Path("a.png"), "good")
        assert Sample("a.png", good).label == 0

    @pytest.mark.parametrize("mask", ["mask/a.png", Path("mask/a.png"), ["mask/a.png"]])
    def test_one_mask(self, mask: object) -> None:
        assert Sample("a.png", "crack", mask).masks == (Path("mask/a.png"),)

    @pytest.mark.parametrize("defect", [0, 1, None, "", True])
    def test_a_defect_is_named(self, defect: object) -> None:
        with pytest.raises(InputError, match="it must be 'good', 'unknown' or a defect's name"):
            Sample("a.png", defect)


class TestMask:
    @staticmethod
    def sample(tmp_path: Path, *values: np.ndarray) -> Sample:
        paths = tuple(tmp_path / f"{number}.png" for number in range(len(values)))
        for path, value in zip(paths, values, strict=True):
            path.write_bytes(cv2.imencode(".png", value)[1].tobytes())
        return Sample(tmp_path / "image.png", "hole", paths)

    def test_union_of_everything_above_zero(self, tmp_path: Path) -> None:
        first = np.array([[0, 1, 0]], dtype=np.uint8)
        second = np.array([[0, 0, 256]], dtype=np.uint16)  # vanishes where 16 bits are cut to 8
        mask = read_mask(self.sample(tmp_path, first, second), (1, 3))
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, [[False, True, True]])

    def test_colour_counts_and_opacity_does_not(self, tmp_path: Path) -> None:
        rgba = np.zeros((1, 2, 4), dtype=np.uint8)
        rgba[..., 3] = 255
        rgba[0, 1, 2] = 9
        np.testing.assert_array_equal(read_mask(self.sample(tmp_path, rgba), (1, 2)), [[False, True]])

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_what_is_wholly_transparent_is_not_marked(self, tmp_path: Path, dtype: type) -> None:
        # Erased strokes keep their colour in most drawing programs.
        rgba = np.full((1, 3, 4), np.iinfo(dtype).max, dtype=dtype)
        rgba[0, :, 3] = (0, 1, np.iinfo(dtype).max)
        mask = read_mask(self.sample(tmp_path, rgba), (1, 3))
        np.testing.assert_array_equal(mask, [[False, True, True]])

    @pytest.mark.parametrize("colour", [False, True])
    @pytest.mark.parametrize(("ending", "quality"), [("jpg", 50), ("webp", 50), ("webp", 101), ("png", 3)])
    def test_traces_of_compression_are_no_marks(
        self, tmp_path: Path, ending: str, quality: int, colour: bool
    ) -> None:
        drawn = np.zeros((64, 64), dtype=np.uint8)
        cv2.circle(drawn, (30, 28), 13, 255, -1)
        flags = {"jpg": cv2.IMWRITE_JPEG_QUALITY, "webp": cv2.IMWRITE_WEBP_QUALITY}
        flag = flags.get(ending, cv2.IMWRITE_PNG_COMPRESSION)
        pixels = cv2.cvtColor(drawn, cv2.COLOR_GRAY2BGR) if colour else drawn
        encoded = cv2.imencode(f".{ending}", pixels, [flag, quality])[1]
        sample = self.sample(tmp_path, drawn)
        sample.masks[0].write_bytes(encoded.tobytes())
        mask = read_mask(sample, drawn.shape)
        lossy = ending == "jpg" or quality == 50
        traces = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE) > 0
        assert (np.count_nonzero(traces) > 1.1 * np.count_nonzero(drawn)) == lossy
        # Its edge may move by half a pixel.
        assert np.count_nonzero(mask != (drawn > 0)) <= (0.1 * np.count_nonzero(drawn) if lossy else 0)

    def test_another_size_is_resized_to_the_nearest(self, tmp_path: Path) -> None:
        small = np.array([[0, 255], [0, 0]], dtype=np.uint8)
        expected = np.kron(small > 0, np.ones((3, 2), dtype=bool))
        np.testing.assert_array_equal(read_mask(self.sample(tmp_path, small), (6, 4)), expected)

    @pytest.mark.parametrize("size", [(6, 4), (7, 4), (300, 200), (299, 200), (301, 200)])
    def test_another_shape_is_refused(self, tmp_path: Path, size: tuple[int, int]) -> None:
        """But for a side that was rounded to whole pixels."""
        mask = np.full((3, 2), 255, dtype=np.uint8)
        sample = self.sample(tmp_path, mask)
        assert read_mask(sample, size).all()
        kinds = {255: DefectKind("crack", 255, 1, True)}
        assert len(read_regions(sample, size, kinds)) == 1
        message = rf"0\.png: 2 x 3 pixels, where the image has {size[0]} x {size[1]}, upright"
        with pytest.raises(InputError, match=message):
            read_mask(sample, size[::-1])
        with pytest.raises(InputError, match=message):
            read_regions(sample, size[::-1], kinds)

    def test_an_image_smaller_than_its_mask_was_rounded(self, tmp_path: Path) -> None:
        """Of a mask of 1003 rows a quarter is 250.75, of one of 4100 a sixteenth 256.25."""
        for number, (shape, size) in enumerate([((1003, 1500), (250, 375)), ((4100, 3003), (256, 187))]):
            cv2.imwrite(str(tmp_path / f"{number}.png"), np.full(shape, 255, dtype=np.uint8))
            assert read_mask(Sample("a.png", "crack", tmp_path / f"{number}.png"), size).all()

    def test_good_images_have_an_empty_mask(self) -> None:
        mask = read_mask(Sample(Path("a.png"), "good"), (3, 4))
        assert mask.shape == (3, 4)
        assert not mask.any()

    def test_unreadable(self, tmp_path: Path) -> None:
        sample = self.sample(tmp_path, np.zeros((2, 2), dtype=np.uint8))
        sample.masks[0].write_bytes(b"")
        with pytest.raises(InputError, match=r"0\.png: the file is empty"):
            read_mask(sample, (2, 2))


class TestHeldOutImages:
    def test_a_plain_folder_and_a_file(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.png", "sub/b.png")
        assert names(held_out_images(tmp_path), tmp_path) == ["a.png", "sub/b.png"]
        assert held_out_images(tmp_path / "a.png") == [tmp_path / "a.png"]

    def test_the_validation_part(self, tmp_path: Path) -> None:
        root = mvtec(tmp_path / "bottle")
        touch(root, "validation/good/0.png", "validation/good/1.png")
        assert names(held_out_images(root), root) == ["validation/good/0.png", "validation/good/1.png"]

    def test_neither_training_nor_test_images(self, tmp_path: Path) -> None:
        root = mvtec(tmp_path / "bottle")
        for folder in (root, root / "test"):
            with pytest.raises(InputError, match="without a validation part"):
                held_out_images(folder)


class TestDefectiveImages:
    def test_a_plain_folder_and_a_file(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.png", "sub/b.png")
        assert names(defective_images(tmp_path), tmp_path) == ["a.png", "sub/b.png"]
        assert defective_images(tmp_path / "a.png") == [tmp_path / "a.png"]

    def test_neither_good_images_nor_masks(self, tmp_path: Path) -> None:
        root = mvtec(tmp_path / "bottle")
        known = [sample.image for sample in read_dataset(root).test if sample.label == 1]
        assert known
        assert defective_images(root) == known
        assert names(defective_images(root / "test"), root) == names(known, root)

    def test_none_is_known_to_be_defective(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/a.png", "test/b.png")
        with pytest.raises(InputError, match="no image is known to be defective; name a folder"):
            defective_images(tmp_path)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layout is 'coco'; allowed are auto, mvtec_ad"):
        read_dataset(tmp_path, layout="coco")
    with pytest.raises(InputError, match="is missing; it must be a folder or a CSV file"):
        read_dataset(tmp_path / "nowhere")
    touch(tmp_path, "a.png")
    with pytest.raises(InputError, match="is a file; it must be a folder or a CSV file"):
        read_dataset(tmp_path / "a.png")
    with pytest.raises(InputError, match="missing"):
        training_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("fixture", "layout", "train", "validation", "test"),
    [
        (
            "bottle",
            "mvtec_ad",
            209,
            0,
            {"good": 20, "broken_large": 20, "broken_small": 22, "contamination": 21},
        ),
        (
            "transistor",
            "mvtec_ad",
            213,
            0,
            {"good": 60, "bent_lead": 10, "cut_lead": 10, "damaged_case": 10, "misplaced": 10},
        ),
        ("magnetic_tile", "mvtec_ad", 384, 0, {"good": 96, "blowhole": 115, "crack": 57, "fray": 32}),
        ("juice_bottle", "mvtec_loco", 301, 34, {"good": 27, "logical_anomalies": 71}),
    ],
)
def test_real_data_sets(
    request: pytest.FixtureRequest,
    fixture: str,
    layout: str,
    train: int,
    validation: int,
    test: dict[str, int],
) -> None:
    dataset = read_dataset(request.getfixturevalue(fixture))
    assert (dataset.layout, len(dataset.train), len(dataset.validation)) == (layout, train, validation)
    assert Counter(sample.defect for sample in dataset.test) == test
    assert all(len(sample.masks) == 1 for sample in dataset.test if sample.label)
    for sample in dataset.test[::17]:
        size = read_image(sample.image).shape[:2]
        assert read_mask(sample, size).any() == bool(sample.label)


def test_masks_with_endings_in_capitals_are_no_images(tmp_path: Path) -> None:
    touch(tmp_path, *(f"MT_Free/Imgs/{n}.{ending}" for n in range(10) for ending in ("JPG", "PNG")))
    touch(tmp_path, "MT_Crack/Imgs/b.JPG", "MT_Crack/Imgs/b.PNG")
    dataset = read_dataset(tmp_path)
    assert {sample.image.suffix for sample in (*dataset.train, *dataset.test)} == {".JPG"}


@pytest.mark.parametrize(
    ("files", "named"),
    [(["test/good/0.png", "test/hole/0.png"], "test"), (["hole/images/0.png", "hole/mask/0.png"], "mask")],
)
def test_good_beside_tests_or_masks_is_refused(tmp_path: Path, files: list[str], named: str) -> None:
    touch(tmp_path, *(f"good/{n}.png" for n in range(5)), *files)
    with pytest.raises(InputError, match=f"holds folders named {named}, but no data set"):
        read_dataset(tmp_path)


def test_the_split_is_the_same_wherever_the_folder_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("here", "there"):
        touch(tmp_path / place, *(f"good/{n}.png" for n in range(20)), "hole/0.png")
    monkeypatch.chdir(tmp_path)
    trained = [[path.name for path in training_images(root)] for root in (tmp_path / "here", "here", "there")]
    assert trained[0] == trained[1] == trained[2]


def test_a_larger_mask_gives_each_pixel_its_nearest(tmp_path: Path) -> None:
    large = np.zeros((9, 9), np.uint8)
    large[4, 4] = 255
    cv2.imwrite(str(tmp_path / "0.png"), large)
    mask = read_mask(Sample(Path("a.png"), "hole", (tmp_path / "0.png",)), (3, 3))
    np.testing.assert_array_equal(np.argwhere(mask), [[1, 1]])
