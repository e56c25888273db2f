"""JSON with a list of `images`: COCO's captions, with NoCaps and VizWiz, which follow it; image_info; Karpathy's."""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from preprocessing.annotations.entry import Entry, Source, caption_of, captions_of, file_name_of, id_of, shown

REJECTED, PRECANNED = "is_rejected", "is_precanned"
"""VizWiz: a caption its makers found useless, and the sentence that was there to be chosen for unusable pictures."""


def is_coco(source: Source) -> str:
    """Why a file is taken for COCO's captions; empty when it is not."""
    images, annotations = _list(source, "images"), _list(source, "annotations")
    if not images or not annotations or not isinstance(annotations[0], dict) or "caption" not in annotations[0]:
        return ""
    kind = " (VizWiz's: captions are marked as rejected or pre-canned)" if REJECTED in annotations[0] else ""
    return f"it is JSON with `images` and `annotations` that have a `caption`{kind}"


def read_coco(source: Source) -> Iterator[Entry]:
    """Captions in the order of their annotation ids; the same id with the same text counts once."""
    path, captions = source.path, _captions_by_image(source)
    images = [
        (id_of(image["id"], f"{path}: an image", source.number_ids), image) for image in source.document["images"]
    ]
    unknown = captions.keys() - {image_id for image_id, _ in images}
    if unknown:
        raise ValueError(f"{path}: captions of image {min(unknown)}, which is not among its images")
    for image_id, image in images:
        name = file_name_of(image["file_name"], f"{path}: image {image_id}")
        about = (image_id, name, source.split or "train", captions.get(image_id, ()), _folders(source))
        yield Entry(*about, size=_size_of(image), id_is_number=source.number_ids[image_id])


def _size_of(image: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height of a picture of COCO's; (0, 0) where they are not said."""
    width, height = (image.get(side) for side in ("width", "height"))
    if isinstance(width, int) and isinstance(height, int) and 0 < min(width, height) <= max(width, height) < 1 << 31:
        return width, height
    return 0, 0


def _captions_by_image(source: Source) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[tuple[tuple[bool, Any], str]]] = {}
    seen = set()
    for annotation in source.document["annotations"]:
        image_id = id_of(annotation["image_id"], f"{source.path}: a caption", source.number_ids)
        captions = found.setdefault(image_id, [])
        if _is_rejected(annotation, source):
            continue
        where = f"{source.path}: image {image_id}"
        for text in caption_of(annotation["caption"], where, source.notes):
            number = annotation.get("id", len(captions))
            if not isinstance(number, int | str):
                raise ValueError(f"{where}: an annotation id is {shown(number)}, expected a whole number")
            if (image_id, number, text) not in seen:
                seen.add((image_id, number, text))
                captions.append(((isinstance(number, str), number), text))
    return {
        image_id: tuple(text for _, text in sorted(captions, key=lambda each: each[0]))
        for image_id, captions in found.items()
    }


def _is_rejected(annotation: dict[str, Any], source: Source) -> bool:
    if annotation.get(REJECTED) is True:
        note = "captions rejected by the data set's makers"
    elif annotation.get(PRECANNED) is True:
        note = "pre-canned captions"
    else:
        return False
    source.notes[f"{note}, {'kept' if source.keep_rejected else 'left out'}"] += 1
    return not source.keep_rejected


def is_image_info(source: Source) -> str:
    """Why a file is taken for a list of pictures without captions; empty when it is not."""
    images = _list(source, "images")
    named = images and isinstance(images[0], dict) and {"id", "file_name"} <= images[0].keys()
    if not named or _list(source, "annotations") or "sentences" in images[0]:
        return ""
    return "it is JSON with `images` and no captions (COCO's image_info)"


def read_image_info(source: Source) -> Iterator[Entry]:
    """Pictures to be captioned."""
    for image in source.document["images"]:
        image_id = id_of(image["id"], f"{source.path}: an image", source.number_ids)
        name = file_name_of(image["file_name"], f"{source.path}: image {image_id}")
        about = (image_id, name, source.split or "test", (), _folders(source))
        yield Entry(*about, captioned=False, id_is_number=source.number_ids[image_id])


def _folders(source: Source) -> tuple[str, ...]:
    """COCO's own: captions_val2017.json belongs to val2017/."""
    return tuple(dict.fromkeys(("", source.split or "train", re.sub(r"^(captions|image_info)_", "", source.path.stem))))


def is_karpathy(source: Source) -> str:
    """Why a file is taken for one of Karpathy's; empty when it is not."""
    images = _list(source, "images")
    fits = images and isinstance(images[0], dict) and "sentences" in images[0]
    return "it is JSON with `images` that have `sentences`" if fits else ""


def read_karpathy(source: Source) -> Iterator[Entry]:
    """COCO's pictures by their COCO id, others (Flickr) by file name without suffix."""
    for image in source.document["images"]:
        name = file_name_of(image["filename"], f"{source.path}: an image")
        where = f"{source.path}: image {name}"
        cocoid = image.get("cocoid")
        image_id = PurePosixPath(name).stem if "cocoid" not in image else id_of(cocoid, where, source.number_ids)
        path = str(PurePosixPath(image.get("filepath") or "") / name)
        texts = (caption for each in image["sentences"] for caption in captions_of(each["raw"], where, source.notes))
        split, is_number = file_name_of(image["split"], f"{where}, its split"), source.number_ids.get(image_id, False)
        yield Entry(image_id, path, split, tuple(texts), ("",), id_is_number=is_number)


def _list(source: Source, key: str) -> list[Any]:
    """A list of the document; empty where there is none."""
    value = source.document.get(key) if isinstance(source.document, dict) else None
    return value if isinstance(value, list) else []
