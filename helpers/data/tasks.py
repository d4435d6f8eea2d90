"""The task that a profile's data name."""

from helpers.data import catalogue, files, judges, naming
from helpers.data.atlas_task import AtlasTask
from helpers.data.rows_task import RowsTask
from helpers.data.sizes import Sizes
from helpers.data.stories import StoryTask
from helpers.data.topics import TopicTask

Task = AtlasTask | StoryTask | TopicTask | RowsTask


def task(data: str, score: str, seed: int, sizes: Sizes, places: int) -> Task:
    """The task that a profile's `data` and `score` name; places: how many the atlas has.
    Raises ValueError or FileNotFoundError for a file or hub data set that cannot be had, and for a score that cannot
    choose among a model's own answers."""
    source = naming.source_of(data)
    if source is not None:
        judge, content = judges.content_id(score), files.content_id(source)
        before = naming.split_prefix(data)[0]
        return RowsTask(source, before, score, seed, sizes, judge, content)
    if data.startswith(catalogue.ATLAS):
        return AtlasTask(catalogue.mixed_families(data), places, seed, sizes)
    if data.startswith(naming.TOPICS):
        return TopicTask(data.removeprefix(naming.TOPICS), seed, sizes)
    return StoryTask(data, seed, sizes)
