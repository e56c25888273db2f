"""A captioned picture as a report shows it: each run's caption with its scores, claims and attention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from sat.evaluation.attention_map import cells_at
from sat.report.choose import is_wholly_true, per_word, ranking_metric
from sat.report.panels import Panels, jpeg_uri, panels
from sat.report.pictures import Source, seen_by_encoder
from sat.report.reading import Claim, RunReport
from sat.shards.pictures import BadPicture, decode


@dataclass(frozen=True)
class Said:
    """What one run says of a picture."""

    run: int
    """Its number, for its colour."""
    name: str
    """Of the run; empty where there is but one."""
    caption: str
    finished: bool
    scores: Mapping[str, float]
    """By metric; of an image that could not be scored none."""
    log_probability: float | None
    """None where neither scores nor attention tell it."""
    per_word: float | None
    """The same, divided by the words and the end."""
    panels: Panels | None
    claims: Sequence[Claim] | None
    """None where the truth is not known."""
    others: Sequence[tuple[str, float]]
    """The further captions, best first, each with its log-probability."""


@dataclass(frozen=True)
class Article:
    """A picture and what is said of it."""

    name: str
    picture: str
    """A data URI; empty where there is none."""
    problem: str
    """Why there is none."""
    metric: str
    """By which captions are ranked; empty without scores."""
    said: Sequence[Said]
    references: Sequence[str]
    holds: bool | None
    """Whether the first run's caption is wholly true; None where that is not known."""


def article(
    image_id: str, runs: Sequence[RunReport], source: Source | None, references: Sequence[str], attention: bool
) -> Article:
    """One picture; without `attention` no panels."""
    picture, problem = _picture(source)
    claims = runs[0].claims.get(image_id, ())
    return Article(
        name=source.name if source else image_id,
        picture=jpeg_uri(picture) if picture else "",
        problem=problem,
        metric=ranking_metric(runs),
        said=[_said(image_id, number, run, len(runs) > 1, picture, attention) for number, run in enumerate(runs)],
        references=references,
        holds=is_wholly_true(claims) if runs[0].claims else None,
    )


def _picture(source: Source | None) -> tuple[Image.Image | None, str]:
    if source is None:
        return None, "no picture"
    try:
        return decode(source.read()), ""
    except BadPicture as error:
        return None, str(error)


def _said(
    image_id: str, number: int, run: RunReport, several: bool, picture: Image.Image | None, attention: bool
) -> Said:
    table, caption, kept = run.table, run.captions[image_id], run.predictions.get(image_id)
    row = table.image_ids.index(image_id) if image_id in table.image_ids else None
    sure = kept.log_probability if kept else None
    sure = sure if row is None else float(table.log_probabilities[row])
    return Said(
        run=number,
        name=run.name if several else "",
        caption=caption,
        finished=kept is None or kept.finished if row is None else bool(table.finished[row]),
        scores={} if row is None else {name: float(values[row]) for name, values in table.per_image.items()},
        log_probability=sure,
        per_word=None if sure is None else per_word(sure, caption),
        panels=_panels(image_id, run, picture) if picture and attention else None,
        claims=run.claims.get(image_id, ()) if run.claims else None,
        others=[] if row is None or not table.others else [(o.caption, o.log_probability) for o in table.others[row]],
    )


def _panels(image_id: str, run: RunReport, picture: Image.Image) -> Panels | None:
    """The words over what the encoder saw; of regions, over the picture. None where nobody knows where they lie."""
    if run.attention is None:
        return None
    prediction, seen = run.predictions[image_id], seen_by_encoder(picture, run.features)
    if prediction.boxes is not None:
        return panels(prediction, picture, run.attention.where(prediction, *picture.size))
    if not len(run.attention.centres):
        return None
    return panels(prediction, seen, cells_at(run.attention.centres, "", *seen.size))
