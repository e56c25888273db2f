"""How samples are read into batches. Imports no torch, so that settings load at once."""

from dataclasses import dataclass

from sat.settings import check, setting


@dataclass(frozen=True)
class CacheOptions:
    """Where the shards of remote data sets are kept on this machine."""

    cache_dir: str = setting("", may_change=True)
    """Where remote shards are kept; empty: a folder under the user's cache."""
    cache_gb: float = setting(50.0, above=0, may_change=True)
    """Upper bound of that cache, in GB."""


@dataclass(frozen=True)
class LoaderOptions(CacheOptions):
    """How the loader makes batches of samples; the samples of a batch depend on run_length and window_shards alone."""

    captions_per_image: int = setting(5, above=0)
    """Captions used of each image and step; an image with more shows others in other epochs."""
    max_caption_length: int = setting(50, above=0)
    """Words kept of a caption."""
    run_length: int = setting(4, above=0)
    """Consecutive samples read together; shards are already in random order."""
    window_shards: int = setting(0)
    """For sets larger than a cache whose server gives no byte ranges: shards that the cache has room for; samples are
    shuffled among half of them at a time, and each shard is fetched once per epoch. 0: samples of all shards."""

    num_workers: int = setting(2, may_change=True)
    """Reader processes per rank; the order of samples does not depend on it."""
    on_bad_sample: str = setting("fail", choices=("fail", "quarantine"), may_change=True)
    """`fail`, or `quarantine`: a damaged sample becomes a counted zero-weight slot."""
    max_bad_samples: int = setting(100, may_change=True)
    """With `quarantine`: stop after this many in an epoch, per rank."""

    def __post_init__(self) -> None:
        check(self, "data")

    @property
    def window(self) -> int:
        """Shards shuffled together, 0 all: those of two windows are in the cache where one follows the other."""
        return (self.window_shards + 1) // 2
